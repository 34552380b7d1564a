/* Rows of a matrix times vectors, on any processor. */
#define L 4
#define TABLE pixtral_portable_kernel
#include "matvec_float.h"
