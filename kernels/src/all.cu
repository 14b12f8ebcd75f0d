// One translation unit: all kernels in one module.
#include "attention.cu"
#include "matvec.cu"
#include "pack.cu"
#include "rows.cu"
