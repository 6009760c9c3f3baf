// Tells which OpenMP runtime the libraries of this folder are bound to.

#include <omp.h>

extern "C" void *runtime() { return reinterpret_cast<void *>(&omp_get_max_threads); }
