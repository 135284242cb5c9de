#if defined(__x86_64__)

#define HFS_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c")))
#define HFS_METHOD \
  __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))) inline
#define HFS_INLINE static HFS_METHOD

#include "vector_avx512.h"

namespace {
using Vector = Avx512;
}

#include "update_kernels.h"

namespace hfs {
const Kernels avx512_kernels = {update, norms, square_sum};
}

#endif  // __x86_64__
