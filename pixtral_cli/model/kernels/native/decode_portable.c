/* decode_floats.h in the instructions of every processor. */
#define NAME(function) function##_portable
#include "decode_floats.h"
