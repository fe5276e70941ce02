// One instruction set's kernels. setup.py compiles this file once per instruction set, with
// ZO_ISA naming it and the flags that allow it. Everything but the table has internal linkage, so
// no function compiled for a wider instruction set can be picked by the linker for another.
#if defined(ZO_ISA_AVX512) || defined(ZO_ISA_AVX512BF16)
#include "simd_avx512.h"
#elif defined(ZO_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(ZO_ISA_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

#include "tables.h"

#define ZO_JOIN_(a, b) a##b
#define ZO_JOIN(a, b) ZO_JOIN_(a, b)
#define ZO_STRING_(a) #a
#define ZO_STRING(a) ZO_STRING_(a)

namespace zo {

extern const Kernels ZO_JOIN(kernels_, ZO_ISA);
const Kernels ZO_JOIN(kernels_, ZO_ISA) = {
    ZO_STRING(ZO_ISA),
    {distribution<Normal>(), distribution<Rademacher>()},
    random_words,
    {quant_row<F32>(), quant_row<BF16>(), quant_row<F16>()},
};

}  // namespace zo
