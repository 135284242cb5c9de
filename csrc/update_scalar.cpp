#define HFS_TARGET
#define HFS_METHOD __attribute__((always_inline)) inline
#define HFS_INLINE static HFS_METHOD

#include "vector_scalar.h"

namespace {
using Vector = Scalar;
}

#include "update_kernels.h"

namespace hfs {
const Kernels scalar_kernels = {update, norms, square_sum};
}
