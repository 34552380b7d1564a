/* The empty Python module that makes this library an extension of a wheel, and the choice of instructions. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "native.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Loaded by ctypes: see native.py beside it.", 0, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }

enum instructions instructions = PORTABLE;

#if defined(__x86_64__)
/* Compilers of some years ago cannot be asked for it as for the others, which also ask the system. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

int pixtral_best_instructions(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
        return PORTABLE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return AVX2;
    return __builtin_cpu_supports("avx512bf16") ? AVX512BF16 : AVX512;
#else
    return PORTABLE;
#endif
}

/* `wanted` must not be beyond the best. */
void pixtral_use_instructions(int wanted) { instructions = (enum instructions)wanted; }

__attribute__((constructor)) static void choose(void) { instructions = (enum instructions)pixtral_best_instructions(); }
