// Compiled once for each instruction set; HANOK_KERNELS names the table, HANOK_NAME the instruction set.

#include "attention.h"
#include "dense.h"
#include "elementwise.h"
#include "pack.h"
#include "panels.h"

extern const Kernels HANOK_KERNELS = {HANOK_NAME, dense, product, pack, unpack, look_up, attend, rms_norm, rotate, gate,
                               add, copy};
