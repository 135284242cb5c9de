// The yardstick of cpu_adam.py: a loop that reads four arrays and writes three of them, like fp32
// Adam, with next to no arithmetic. Built by the bench with -O3 -march=native.
#include <cstdint>
#include <thread>
#include <vector>

static void update(float* p, const float* g, float* m, float* v, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float x = g[i];
    p[i] += x;
    m[i] += x;
    v[i] += x;
  }
}

extern "C" void stream(float* p, const float* g, float* m, float* v, int64_t numel, int threads) {
  std::vector<std::thread> helpers;
  const int64_t part = (numel / threads + 15) / 16 * 16;
  for (int i = 1; i < threads; ++i) {
    const int64_t end = i + 1 == threads ? numel : (i + 1) * part;
    helpers.emplace_back(update, p, g, m, v, i * part, end);
  }
  update(p, g, m, v, 0, threads == 1 ? numel : part);
  for (std::thread& helper : helpers) helper.join();
}
