#if defined(__x86_64__)

#define HFS_TARGET __attribute__((target("avx2,f16c")))
#define HFS_METHOD __attribute__((always_inline, target("avx2,f16c"))) inline
#define HFS_INLINE static HFS_METHOD

#include "vector_avx2.h"

namespace {
using Vector = Avx2;
}

#include "update_kernels.h"

namespace hfs {
const Kernels avx2_kernels = {update, norms, square_sum};
}

#endif  // __x86_64__
