// Optimizer updates over flat shards on the CPU: one pass reads gradient, master and moments,
// computes in registers, and writes master, moments and the low-precision parameter.
//
// hf_speed/ops/reference.py is the specification: each operation is one IEEE fp32 operation, in a
// fixed order, never fused. So the result does not depend on the instruction set, on threads, or
// on how a group is cut into chunks, and equals that of the Triton kernels bit for bit.
#ifndef HF_SPEED_UPDATE_H_
#define HF_SPEED_UPDATE_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { HFS_ADAM = 0, HFS_LION = 1, HFS_ADAGRAD = 2, HFS_SGD = 3, HFS_SGD_PLAIN = 4 };
enum { HFS_NONE = 0, HFS_FP32 = 1, HFS_BF16 = 2, HFS_FP16 = 3, HFS_INT8 = 4 };
enum { HFS_ISA_BEST = 0, HFS_ISA_SCALAR = 1, HFS_ISA_AVX2 = 2, HFS_ISA_AVX512 = 3 };
enum {
  HFS_OK = 0,
  HFS_BAD_ARGUMENT = -1,
  HFS_BAD_SPANS = -2,
  HFS_BAD_ISA = -3,
  HFS_NO_MEMORY = -4
};

#define HFS_BLOCK INT64_C(256)  // elements that share one scale in an 8-bit moment
#define HFS_TILE INT64_C(4096)  // elements that `square_sum` adds up at a time
#define HFS_ROW INT64_C(12)     // fp32 numbers of a span: see hf_speed/ops/spans.py

typedef struct HfsUpdate {
  int32_t rule;
  int32_t grad_type;    // HFS_FP32, HFS_BF16 or HFS_FP16
  int32_t moment_type;  // HFS_NONE (HFS_SGD_PLAIN only), HFS_FP32, HFS_BF16 or HFS_INT8
  int32_t out_type;     // HFS_NONE, HFS_BF16 or HFS_FP16
  int64_t numel;
  int64_t offset;  // of element 0 in its group, a multiple of HFS_BLOCK
  uint64_t seed;   // of stochastic rounding
  float* master;
  const void* grad;
  void* first;         // exp_avg, sum or momentum_buffer
  void* second;        // exp_avg_sq; null where the rule has one moment
  float* first_scale;  // HFS_INT8: one per HFS_BLOCK elements
  float* second_scale;
  void* out;             // null for HFS_NONE
  const int64_t* stops;  // (num_spans,) increasing, the last is numel
  const float* rows;     // (num_spans, HFS_ROW)
  int32_t num_spans;
  int32_t num_threads;
  int32_t isa;
  int32_t reserved;  // 0
} HfsUpdate;

// Grows with every change of this header or of aio.h: who loads a stale build must notice.
#define HFS_ABI 1
int32_t hfs_abi(void);

// The widest instruction set that this machine runs and this build has.
int32_t hfs_best_isa(void);

// Does one update in place. Returns HFS_OK, or what is wrong, and then nothing was written.
int32_t hfs_update(const HfsUpdate* update);

// For each span, the sums of squares of the master and of the direction of Adam's next update,
//     (step_size * m) / denominator + l2 * p         where l2 is not added to the gradient
// (num_spans, 2) of fp64, zeros for untouched spans; reads what the update reads, writes only
// `sums`. With lr = -1 in step_size these give a trust ratio per span before the pass that updates:
// LAMB (arXiv:1904.00962) is this pass, then HFS_ADAM with a step size per span.
// HFS_ADAM with fp32 or bf16 moments only. Each sum is added in the order of `square_sum` over the
// whole chunk with zeros outside of the span.
int32_t hfs_update_norms(const HfsUpdate* update, double* sums);

// The sum of squares of `numel` values of a float type, in fp64, always added in the same order.
int32_t hfs_square_sum(const void* values, int32_t type, int64_t numel, int32_t num_threads,
                       int32_t isa, double* sum);

#ifdef __cplusplus
}
#endif
#endif  // HF_SPEED_UPDATE_H_
