#include "update.h"

#include <stdlib.h>

#include "threads.h"
#include "update_isa.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

using hfs::Kernels;
using hfs::Keys;
using hfs::Work;

// Elements that a thread takes at a time: 1 MiB of fp32 streams best, and a small chunk is shared
// by all threads, several times, should one be slower.
constexpr int64_t kLargestTask = 64 * HFS_TILE;
constexpr int64_t kSmallestTask = 4 * HFS_TILE;

// A parameter of this many elements or more is in no cache when it is read again, so it is written
// past them: that saves reading the lines first.
constexpr int64_t kStreamed = INT64_C(1) << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Null where the instruction set is not to be had.
const Kernels* kernels_of(int32_t isa) {
  if (isa == HFS_ISA_BEST) isa = hfs_best_isa();
  if (isa < HFS_ISA_SCALAR || isa > hfs_best_isa()) return nullptr;
#if defined(__x86_64__)
  if (isa == HFS_ISA_AVX512) return &hfs::avx512_kernels;
  if (isa == HFS_ISA_AVX2) return &hfs::avx2_kernels;
#endif
  return &hfs::scalar_kernels;
}

// Default rounding, subnormals kept, whatever the calling thread or the program has set.
class StandardArithmetic {
 public:
#if defined(__x86_64__)
  StandardArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~StandardArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

Keys keys_of(uint64_t seed) {
  const uint32_t lower = mix(static_cast<uint32_t>(seed));
  const uint32_t first = mix(static_cast<uint32_t>(seed >> 32) ^ lower);
  return {first, mix(first ^ lower ^ 0x9E3779B9u)};
}

int num_moments(int32_t rule) {
  if (rule == HFS_ADAM) return 2;
  return rule == HFS_SGD_PLAIN ? 0 : 1;
}

bool is_float_type(int32_t type) {
  return type == HFS_FP32 || type == HFS_BF16 || type == HFS_FP16;
}

bool has_moments(const HfsUpdate& u) {
  const int count = num_moments(u.rule);
  const bool is_int8 = u.moment_type == HFS_INT8;
  if (count == 0) return u.moment_type == HFS_NONE;
  if (u.moment_type != HFS_FP32 && u.moment_type != HFS_BF16 && !is_int8) return false;
  if (u.first == nullptr || (is_int8 && u.first_scale == nullptr)) return false;
  if (count == 1) return u.second == nullptr;
  return u.second != nullptr && (!is_int8 || u.second_scale != nullptr);
}

int32_t check(const HfsUpdate& u) {
  if (u.rule < HFS_ADAM || u.rule > HFS_SGD_PLAIN || !is_float_type(u.grad_type)) {
    return HFS_BAD_ARGUMENT;
  }
  if (u.out_type != HFS_NONE && u.out_type != HFS_BF16 && u.out_type != HFS_FP16) {
    return HFS_BAD_ARGUMENT;
  }
  if (u.numel < 0 || u.offset < 0 || u.offset % HFS_BLOCK != 0) return HFS_BAD_ARGUMENT;
  if (u.numel == 0) return HFS_OK;
  if (u.master == nullptr || u.grad == nullptr || !has_moments(u)) return HFS_BAD_ARGUMENT;
  if ((u.out_type != HFS_NONE) != (u.out != nullptr)) return HFS_BAD_ARGUMENT;
  int64_t before = 0;
  for (int32_t span = 0; span < u.num_spans; ++span) {
    if (u.stops[span] <= before) return HFS_BAD_SPANS;
    before = u.stops[span];
  }
  return before == u.numel ? HFS_OK : HFS_BAD_SPANS;
}

int64_t task_of(int64_t numel, int32_t num_threads) {
  const int64_t share = numel / (4 * int64_t{num_threads < 1 ? 1 : num_threads});
  if (share >= kLargestTask) return kLargestTask;
  return share <= kSmallestTask ? kSmallestTask : share / HFS_TILE * HFS_TILE;
}

struct UpdateJob {
  const Work& work;
  const Kernels& kernels;
  int64_t task;  // elements

  static void run(void* context, int64_t index) {
    const UpdateJob& job = *static_cast<const UpdateJob*>(context);
    const StandardArithmetic standard;
    const int64_t begin = index * job.task;
    const int64_t rest = job.work.numel - begin;
    job.kernels.update(job.work, begin, begin + (rest < job.task ? rest : job.task));
#if defined(__x86_64__)
    // Stores past the caches are seen in order by nobody else, until this.
    if (job.work.streams_out) _mm_sfence();
#endif
  }
};

// The lanes' order of the specification, for numbers that are sums already.
double tile_sum(const double* values, int64_t numel) {
  constexpr int64_t kLanes = 32;
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < numel; ++i) lanes[i % kLanes] += values[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

// Adds up one number per tile, in place: one number per tile of those, until one is left.
double fold(double* sums, int64_t numel) {
  while (numel > 1) {
    const int64_t folded = ceil_div(numel, HFS_TILE);
    for (int64_t i = 0; i < folded; ++i) {
      const int64_t rest = numel - i * HFS_TILE;
      sums[i] = tile_sum(sums + i * HFS_TILE, rest < HFS_TILE ? rest : HFS_TILE);
    }
    numel = folded;
  }
  return numel == 1 ? sums[0] : 0.0;
}

struct SquareSumJob {
  const char* values;
  int32_t type;
  int64_t numel;
  const Kernels& kernels;
  int64_t task;  // elements
  double* sums;

  static void run(void* context, int64_t index) {
    const SquareSumJob& job = *static_cast<const SquareSumJob*>(context);
    const StandardArithmetic standard;
    const int64_t size = job.type == HFS_FP32 ? 4 : 2;
    const int64_t begin = index * job.task;
    const int64_t end = begin + job.task < job.numel ? begin + job.task : job.numel;
    for (int64_t i = begin; i < end; i += HFS_TILE) {
      const int64_t numel = end - i < HFS_TILE ? end - i : HFS_TILE;
      job.sums[i / HFS_TILE] = job.kernels.square_sum(job.values + i * size, job.type, numel);
    }
  }
};

// Of one span: its sums tile by tile, zeros where it is not.
struct NormsJob {
  const HfsUpdate& update;
  const Kernels& kernels;
  const float* row;
  int64_t begin, end;
  double* masters;
  double* directions;

  static void run(void* context, int64_t index) {
    const NormsJob& job = *static_cast<const NormsJob*>(context);
    const StandardArithmetic standard;
    const int64_t tile = job.begin / HFS_TILE + index;
    const int64_t begin = tile * HFS_TILE > job.begin ? tile * HFS_TILE : job.begin;
    const int64_t end = (tile + 1) * HFS_TILE < job.end ? (tile + 1) * HFS_TILE : job.end;
    double sums[2];
    job.kernels.norms(job.update, job.row, begin, end, sums);
    job.masters[tile] = sums[0];
    job.directions[tile] = sums[1];
  }
};

}  // namespace

extern "C" {

int32_t hfs_abi(void) { return HFS_ABI; }

int32_t hfs_best_isa(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return HFS_ISA_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return HFS_ISA_AVX2;
#endif
  return HFS_ISA_SCALAR;
}

int32_t hfs_update(const HfsUpdate* update) {
  const int32_t fault = check(*update);
  if (fault != HFS_OK) return fault;
  const Kernels* kernels = kernels_of(update->isa);
  if (kernels == nullptr) return HFS_BAD_ISA;
  const bool is_aligned = reinterpret_cast<uintptr_t>(update->out) % 64 == 0;
  const Work work = {*update, keys_of(update->seed), is_aligned && update->numel >= kStreamed};
  UpdateJob job = {work, *kernels, task_of(update->numel, update->num_threads)};
  hfs::parallel_for(ceil_div(work.numel, job.task), work.num_threads, UpdateJob::run, &job);
  return HFS_OK;
}

int32_t hfs_update_norms(const HfsUpdate* update, double* sums) {
  const HfsUpdate& u = *update;
  const int32_t fault = check(u);
  if (fault != HFS_OK) return fault;
  if (u.rule != HFS_ADAM || u.moment_type == HFS_INT8) return HFS_BAD_ARGUMENT;
  const Kernels* kernels = kernels_of(u.isa);
  if (kernels == nullptr) return HFS_BAD_ISA;
  const int64_t num_tiles = ceil_div(u.numel, HFS_TILE);
  double* scratch = static_cast<double*>(malloc(2 * num_tiles * sizeof(double) + 1));
  if (scratch == nullptr) return HFS_NO_MEMORY;
  int64_t begin = 0;
  for (int32_t span = 0; span < u.num_spans; ++span) {
    const float* row = u.rows + int64_t{span} * HFS_ROW;
    for (int64_t i = 0; i < 2 * num_tiles; ++i) scratch[i] = 0.0;
    if (row[0] != 0.0f) {
      const int64_t end = u.stops[span];
      NormsJob job = {u, *kernels, row, begin, end, scratch, scratch + num_tiles};
      const int64_t spanned = (end - 1) / HFS_TILE - begin / HFS_TILE + 1;
      hfs::parallel_for(spanned, u.num_threads, NormsJob::run, &job);
    }
    sums[2 * span] = fold(scratch, num_tiles);
    sums[2 * span + 1] = fold(scratch + num_tiles, num_tiles);
    begin = u.stops[span];
  }
  free(scratch);
  return HFS_OK;
}

int32_t hfs_square_sum(const void* values, int32_t type, int64_t numel, int32_t num_threads,
                       int32_t isa, double* sum) {
  if (!is_float_type(type) || numel < 0 || (values == nullptr && numel > 0)) {
    return HFS_BAD_ARGUMENT;
  }
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return HFS_BAD_ISA;
  const int64_t num_tiles = ceil_div(numel, HFS_TILE);
  double* scratch = static_cast<double*>(malloc(num_tiles * sizeof(double) + 1));
  if (scratch == nullptr) return HFS_NO_MEMORY;
  const int64_t task = task_of(numel, num_threads);
  SquareSumJob job = {static_cast<const char*>(values), type, numel, *kernels, task, scratch};
  hfs::parallel_for(ceil_div(numel, task), num_threads, SquareSumJob::run, &job);
  *sum = fold(scratch, num_tiles);
  free(scratch);
  return HFS_OK;
}

}  // extern "C"
