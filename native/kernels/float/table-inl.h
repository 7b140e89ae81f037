// Body of the float kernels, included once per instruction set inside its namespace.

namespace {

// Vectors of 16 lanes that the registers hold: how much a tile may keep there.  1 has no tiles at all, which
// a compiler under a sanitizer would take minutes for.
#if defined(FLASHMOE_SANITIZED)
constexpr int kRegisters = 1;
#else
constexpr int kRegisters = FLASHMOE_REGISTERS;
#endif

#include "kernels/float/norm-inl.h"

#include "kernels/float/conv-inl.h"

#include "kernels/float/delta-inl.h"

#include "kernels/float/cache-inl.h"

#include "kernels/float/attention-inl.h"

#include "kernels/float/latent-inl.h"

constexpr FloatKernels kTable = {
    rms_norm,         add_rows,       gated_rms_norm, causal_conv,    l2_norm, dot,
    delta_head,       rope,           store_key,      store_value,    attend,  merge_parts,
    finish_attention, attend_latents, merge_latents,  finish_latents, softmax, sigmoid_all};

}  // namespace
