// One translation unit: all kernels in one module.
#include "attention.cu"
#include "floats.cu"
#include "narrow.cu"
#include "pack.cu"
#include "rows.cu"
#include "sample.cu"
#include "wide.cu"
