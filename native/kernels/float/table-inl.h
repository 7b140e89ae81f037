// Body of the float kernels, included once per instruction set inside its namespace.

namespace {

constexpr bool kSpecialised = FLASHMOE_SPECIALISED;

#include "kernels/float/norm-inl.h"

#include "kernels/float/delta-inl.h"

#include "kernels/float/attention-inl.h"

constexpr FloatKernels kTable = {rms_norm,   add_rows, gated_rms_norm, causal_conv, l2_norm, dot,
                                 delta_head, rope,     store_cache,    attention,   softmax};

}  // namespace
