// Drives csrc/update.h and csrc/threads.h alone, for the sanitizers: memory of exactly the size
// that is needed, every rule, moment, gradient and instruction set, threads, forks, bad arguments.
// Prints the name of each case that passed; exits 1 at the first that did not.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <thread>
#include <vector>

#include "threads.h"
#include "update.h"

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "failed: %s\n", what);
  exit(1);
}

uint32_t random_state = 1;

uint32_t random_word() {
  random_state = random_state * 1664525u + 1013904223u;
  return random_state >> 8;
}

size_t size_of(int32_t type) {
  if (type == HFS_FP32) return 4;
  return type == HFS_INT8 ? 1 : 2;
}

// Bytes with nothing around them that may be touched, not aligned to more than `size`.
struct Bytes {
  explicit Bytes(size_t count) : count(count), at(static_cast<char*>(malloc(count ? count : 1))) {}
  Bytes(const Bytes& other) : Bytes(other.count) { memcpy(at, other.at, count); }
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { free(at); }
  bool operator==(const Bytes& other) const { return memcmp(at, other.at, count) == 0; }

  size_t count;
  char* at;
};

Bytes random_floats(int64_t numel, int32_t type) {
  Bytes made(numel * size_of(type));
  for (int64_t i = 0; i < numel; ++i) {
    const float x = static_cast<float>(random_word() % 2000) / 1000.0f - 1.0f;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (type == HFS_FP32) memcpy(made.at + 4 * i, &x, 4);
    if (type == HFS_BF16) memcpy(made.at + 2 * i, reinterpret_cast<char*>(&bits) + 2, 2);
    // Any half whose exponent is not that of infinities.
    const uint16_t half = static_cast<uint16_t>(random_word() & 0xBBFF);
    if (type == HFS_FP16) memcpy(made.at + 2 * i, &half, 2);
  }
  return made;
}

Bytes zeros(size_t count) {
  Bytes made(count);
  memset(made.at, 0, count);
  return made;
}

struct Case {
  int32_t rule, grad, moment, out;
  int64_t numel;
};

// A chunk of one case: every other of its spans untouched.
struct Chunk {
  explicit Chunk(const Case& of)
      : of(of),
        master(random_floats(of.numel, HFS_FP32)),
        grad(random_floats(of.numel, of.grad)),
        first(zeros(of.numel * size_of(of.moment))),
        second(zeros(of.numel * size_of(of.moment))),
        first_scale(zeros(blocks() * 4)),
        second_scale(zeros(blocks() * 4)),
        out(zeros(of.out == HFS_NONE ? 0 : 2 * of.numel)) {
    const float row[HFS_ROW] = {1, 0.5f, 0.01f, 0.99f, 0.1f, 0.25f, 0.9f, 0.1f, 0.01f, 1, 1e-8f};
    for (int64_t stop = 0; stop < of.numel;) {
      const int64_t next = stop + 1 + random_word() % 1500;
      stop = next < of.numel ? next : of.numel;
      stops.push_back(stop);
      rows.insert(rows.end(), row, row + HFS_ROW);
      rows[rows.size() - HFS_ROW] = stops.size() % 2 == 1 ? 1.0f : 0.0f;
    }
  }

  int64_t blocks() const { return (of.numel + HFS_BLOCK - 1) / HFS_BLOCK; }

  HfsUpdate request(int32_t isa, int32_t threads) {
    const bool has_first = of.rule != HFS_SGD_PLAIN, has_second = of.rule == HFS_ADAM;
    HfsUpdate made = {};
    made.rule = of.rule;
    made.grad_type = of.grad;
    made.moment_type = has_first ? of.moment : HFS_NONE;
    made.out_type = of.out;
    made.numel = of.numel;
    made.offset = (INT64_C(5) << 32) - 4096;
    made.seed = 12345;
    made.master = reinterpret_cast<float*>(master.at);
    made.grad = grad.at;
    made.first = has_first ? first.at : nullptr;
    made.second = has_second ? second.at : nullptr;
    if (of.moment == HFS_INT8 && has_first) {
      made.first_scale = reinterpret_cast<float*>(first_scale.at);
      if (has_second) made.second_scale = reinterpret_cast<float*>(second_scale.at);
    }
    made.out = of.out == HFS_NONE ? nullptr : out.at;
    made.stops = stops.data();
    made.rows = rows.data();
    made.num_spans = static_cast<int32_t>(stops.size());
    made.num_threads = threads;
    made.isa = isa;
    return made;
  }

  void update(int32_t isa, int32_t threads) {
    const HfsUpdate made = request(isa, threads);
    expect(hfs_update(&made) == HFS_OK, "hfs_update");
  }

  bool operator==(const Chunk& other) const {
    return master == other.master && first == other.first && second == other.second &&
           first_scale == other.first_scale && second_scale == other.second_scale &&
           out == other.out;
  }

  Case of;
  Bytes master, grad, first, second, first_scale, second_scale, out;
  std::vector<int64_t> stops;
  std::vector<float> rows;
};

std::vector<int32_t> instruction_sets() {
  std::vector<int32_t> found;
  for (int32_t isa = HFS_ISA_SCALAR; isa <= hfs_best_isa(); ++isa) found.push_back(isa);
  return found;
}

void every_case_agrees_with_scalar_code() {
  for (int32_t rule = HFS_ADAM; rule <= HFS_SGD_PLAIN; ++rule) {
    for (const int32_t moment : {HFS_FP32, HFS_BF16, HFS_INT8}) {
      for (const int64_t numel : {1, 15, 257, 4096, 9001}) {
        for (const int32_t grad : {HFS_FP32, HFS_BF16, HFS_FP16}) {
          const int32_t out = grad == HFS_FP32 ? HFS_NONE : grad;
          const Chunk start({rule, grad, moment, out, numel});
          Chunk expected = start;
          for (int i = 0; i < 2; ++i) expected.update(HFS_ISA_SCALAR, 1);
          for (const int32_t isa : instruction_sets()) {
            Chunk ours = start;
            for (int i = 0; i < 2; ++i) ours.update(isa, 2);
            expect(ours == expected, "every instruction set gives the same");
          }
        }
      }
    }
  }
}

void threads_agree() {
  const Chunk start({HFS_ADAM, HFS_BF16, HFS_BF16, HFS_BF16, 300000});
  Chunk alone = start;
  alone.update(HFS_ISA_BEST, 1);
  for (const int32_t threads : {2, 3, 8}) {
    Chunk many = start;
    many.update(HFS_ISA_BEST, threads);
    expect(many == alone, "any number of threads gives the same");
  }
}

void callers_at_once_agree() {
  const Chunk start({HFS_LION, HFS_FP32, HFS_FP32, HFS_NONE, 200000});
  Chunk expected = start;
  for (int i = 0; i < 5; ++i) expected.update(HFS_ISA_BEST, 1);
  std::vector<std::unique_ptr<Chunk>> chunks;
  for (int i = 0; i < 4; ++i) chunks.emplace_back(new Chunk(start));
  std::vector<std::thread> callers;
  for (const auto& chunk : chunks) {
    callers.emplace_back([&chunk] {
      for (int i = 0; i < 5; ++i) chunk->update(HFS_ISA_BEST, 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& chunk : chunks) expect(*chunk == expected, "callers at once give the same");
}

void a_forked_child_has_threads_of_its_own() {
  const Chunk start({HFS_SGD, HFS_FP32, HFS_FP32, HFS_NONE, 200000});
  Chunk expected = start;
  expected.update(HFS_ISA_BEST, 2);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a child that waits for its parent's threads ends here
    Chunk ours = start;
    ours.update(HFS_ISA_BEST, 2);
    _exit(ours == expected ? 0 : 1);
  }
  int status = -1;
  expect(waitpid(child, &status, 0) == child, "waitpid");
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child gives the same");
  Chunk again = start;
  again.update(HFS_ISA_BEST, 2);
  expect(again == expected, "the parent goes on");
}

void sums_agree() {
  for (const int32_t type : {HFS_FP32, HFS_BF16, HFS_FP16}) {
    for (const int64_t numel : {0, 1, 33, 4096, 70001}) {
      const Bytes values = random_floats(numel, type);
      double expected = -1.0, found = -2.0;
      expect(hfs_square_sum(values.at, type, numel, 1, HFS_ISA_SCALAR, &expected) == HFS_OK, "sum");
      for (const int32_t isa : instruction_sets()) {
        expect(hfs_square_sum(values.at, type, numel, 2, isa, &found) == HFS_OK, "sum");
        expect(found == expected, "sums of squares are the same");
      }
    }
  }
}

void norms_agree() {
  Chunk chunk({HFS_ADAM, HFS_BF16, HFS_BF16, HFS_NONE, 9001});
  chunk.update(HFS_ISA_BEST, 1);
  const Chunk before = chunk;
  std::vector<double> expected(2 * chunk.stops.size()), found(2 * chunk.stops.size());
  HfsUpdate request = chunk.request(HFS_ISA_SCALAR, 1);
  expect(hfs_update_norms(&request, expected.data()) == HFS_OK, "norms");
  for (const int32_t isa : instruction_sets()) {
    request = chunk.request(isa, 2);
    expect(hfs_update_norms(&request, found.data()) == HFS_OK, "norms");
    expect(found == expected, "norms are the same");
  }
  expect(chunk == before, "norms write nothing");
}

void bad_arguments_are_refused() {
  const Chunk start({HFS_ADAM, HFS_BF16, HFS_INT8, HFS_BF16, 1000});
  Chunk chunk = start;
  const HfsUpdate good = chunk.request(HFS_ISA_BEST, 1);
  const auto refused = [&](int32_t fault, auto change) {
    HfsUpdate bad = good;
    change(bad);
    expect(hfs_update(&bad) == fault, "a bad argument is refused");
  };
  refused(HFS_BAD_ARGUMENT, [](HfsUpdate& u) { u.rule = 5; });
  refused(HFS_BAD_ARGUMENT, [](HfsUpdate& u) { u.grad_type = HFS_INT8; });
  refused(HFS_BAD_ARGUMENT, [](HfsUpdate& u) { u.moment_type = HFS_FP16; });
  refused(HFS_BAD_ARGUMENT, [](HfsUpdate& u) { u.out_type = HFS_FP32; });
  refused(HFS_BAD_ARGUMENT, [](HfsUpdate& u) { u.out = nullptr; });
  refused(HFS_BAD_ARGUMENT, [](HfsUpdate& u) { u.second = nullptr; });
  refused(HFS_BAD_ARGUMENT, [](HfsUpdate& u) { u.first_scale = nullptr; });
  refused(HFS_BAD_ARGUMENT, [](HfsUpdate& u) { u.numel = -1; });
  refused(HFS_BAD_ARGUMENT, [](HfsUpdate& u) { u.offset = 255; });
  refused(HFS_BAD_SPANS, [](HfsUpdate& u) { u.numel -= 1; });
  refused(HFS_BAD_SPANS, [](HfsUpdate& u) { u.num_spans = 0; });
  refused(HFS_BAD_ISA, [](HfsUpdate& u) { u.isa = 99; });
  double sums[2];
  expect(hfs_update_norms(&good, sums) == HFS_BAD_ARGUMENT, "norms refuse 8 bits");
  expect(hfs_square_sum(nullptr, HFS_FP32, 1, 1, 0, sums) == HFS_BAD_ARGUMENT, "no values");
  expect(hfs_square_sum(good.grad, HFS_INT8, 1, 1, 0, sums) == HFS_BAD_ARGUMENT, "bytes");
  expect(chunk == start, "what was refused wrote nothing");
}

void many_small_jobs_end() {
  std::vector<int64_t> counts(64);
  for (int round = 0; round < 2000; ++round) {
    const int threads = 2 + round % 3;
    hfs::parallel_for(
        64, threads, [](void* at, int64_t i) { ++static_cast<int64_t*>(at)[i]; }, counts.data());
  }
  for (const int64_t count : counts) expect(count == 2000, "every task runs once a job");
}

}  // namespace

#define RUN(name) \
  name();         \
  puts(#name)

int main() {
  RUN(every_case_agrees_with_scalar_code);
  RUN(threads_agree);
  RUN(callers_at_once_agree);
  RUN(a_forked_child_has_threads_of_its_own);
  RUN(sums_agree);
  RUN(norms_agree);
  RUN(bad_arguments_are_refused);
  RUN(many_small_jobs_end);
  return 0;
}
