// The threads of the update kernels: a pool of our own, so that no second OpenMP fights torch's.
//
// Workers are made at the first use and sleep between jobs. A forked child starts anew: threads do
// not survive a fork. A caller that finds the pool taken by another does its job alone.
#ifndef HF_SPEED_THREADS_H_
#define HF_SPEED_THREADS_H_

#include <stdint.h>

namespace hfs {

using Task = void (*)(void* context, int64_t index);

// Calls task(context, i) once for each i in [0, num_tasks), on up to `num_threads` threads of which
// the caller is one, and returns when all are done. Which thread runs which i is left open.
// A task must not throw, and must not call this function.
void parallel_for(int64_t num_tasks, int num_threads, Task task, void* context);

}  // namespace hfs

#endif  // HF_SPEED_THREADS_H_
