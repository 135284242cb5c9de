// What update.cpp calls of each instruction set. Each is compiled in a file of its own.
#ifndef HF_SPEED_UPDATE_ISA_H_
#define HF_SPEED_UPDATE_ISA_H_

#include <stdint.h>

#include "update.h"

namespace hfs {

// The two 32-bit keys of a seed: `random_keys` of the specification.
struct Keys {
  uint32_t first, second;
};

// An update with what is decided once for all of it.
struct Work : HfsUpdate {
  Keys keys;
  bool streams_out;  // `out` is written past the caches
};

struct Kernels {
  // Updates elements [begin, end); both are multiples of HFS_BLOCK, `end` or the chunk's.
  void (*update)(const Work& work, int64_t begin, int64_t end);
  // Sums of squares of master and direction over one tile, of elements [begin, end) of span `row`.
  void (*norms)(const HfsUpdate& update, const float* row, int64_t begin, int64_t end,
                double sums[2]);
  // Sum of squares of at most HFS_TILE values.
  double (*square_sum)(const void* values, int32_t type, int64_t numel);
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace hfs

#endif  // HF_SPEED_UPDATE_ISA_H_
