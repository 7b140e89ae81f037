// Regions of code for one instruction set inside a baseline translation unit.
//
// Everything that standard headers define inline must be included before a region begins: a copy compiled
// for AVX-512 may be the one the linker keeps, and would crash older processors.
#pragma once

#define FLASHMOE_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define FLASHMOE_TARGET_BEGIN(features) \
  FLASHMOE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FLASHMOE_TARGET_END FLASHMOE_PRAGMA(clang attribute pop)
#else
#define FLASHMOE_TARGET_BEGIN(features) \
  FLASHMOE_PRAGMA(GCC push_options) FLASHMOE_PRAGMA(GCC target(features))
#define FLASHMOE_TARGET_END FLASHMOE_PRAGMA(GCC pop_options)
#endif

#define FLASHMOE_TARGET_BEGIN_AVX2 FLASHMOE_TARGET_BEGIN("avx2,fma,f16c")
// prfchw: without it a prefetch for a store asks for a line to read, and the store fetches it once more.
#define FLASHMOE_TARGET_BEGIN_AVX512 \
  FLASHMOE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prfchw")

#if defined(__clang__)
#define FLASHMOE_TARGET_BEGIN_DOTPROD FLASHMOE_TARGET_BEGIN("dotprod")
#define FLASHMOE_TARGET_BEGIN_I8MM FLASHMOE_TARGET_BEGIN("dotprod,i8mm")
#else
#define FLASHMOE_TARGET_BEGIN_DOTPROD FLASHMOE_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#define FLASHMOE_TARGET_BEGIN_I8MM FLASHMOE_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")
#endif

// Small bodies must vanish into their loops: a call would spill sixteen vectors.
#define FLASHMOE_INLINE static inline __attribute__((always_inline))
#define FLASHMOE_INLINE_MEMBER inline __attribute__((always_inline))

// Unrolling makes vectors of an array registers.  Under a sanitizer it would only make a file take minutes.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FLASHMOE_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define FLASHMOE_SANITIZED 1
#endif
#endif
#if defined(FLASHMOE_SANITIZED)
#define FLASHMOE_UNROLL(count)
#else
#define FLASHMOE_UNROLL(count) FLASHMOE_PRAGMA(GCC unroll count)
#endif
