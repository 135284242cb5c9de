#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>

namespace hfs {
namespace {

class Pool {
 public:
  // Runs the job unless another caller's runs: false then, and nothing was done.
  bool try_run(int64_t num_tasks, int num_helpers, Task task, void* context) {
    std::unique_lock<std::mutex> one_caller(caller_, std::try_to_lock);
    if (!one_caller.owns_lock()) return false;
    std::unique_lock<std::mutex> lock(mutex_);
    while (num_workers_ < num_helpers && start_worker()) {
    }
    task_ = task;
    context_ = context;
    num_tasks_ = num_tasks;
    next_.store(0, std::memory_order_relaxed);
    places_ = num_helpers < num_workers_ ? num_helpers : num_workers_;
    const int wakes = places_;
    lock.unlock();
    for (int i = 0; i < wakes; ++i) work_.notify_one();
    take_tasks();
    lock.lock();
    places_ = 0;  // who has not woken yet is not needed any more
    done_.wait(lock, [this] { return num_running_ == 0; });
    return true;
  }

 private:
  void take_tasks() {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= num_tasks_) return;
      task_(context_, index);
    }
  }

  static void* worker(void* self) {
    Pool& pool = *static_cast<Pool*>(self);
    std::unique_lock<std::mutex> lock(pool.mutex_);
    for (;;) {
      pool.work_.wait(lock, [&pool] { return pool.places_ > 0; });
      --pool.places_;
      ++pool.num_running_;
      lock.unlock();
      pool.take_tasks();
      lock.lock();
      if (--pool.num_running_ == 0) pool.done_.notify_one();
    }
    return nullptr;
  }

  // Fewer threads than asked for is slower, not wrong, so a failure is no error.
  bool start_worker() {
    // Signals are for the threads of the program, so ours block them all.
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_t thread;
    const bool started = pthread_create(&thread, nullptr, &Pool::worker, this) == 0;
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    if (!started) return false;
    pthread_setname_np(thread, "hf_speed_ops");
    pthread_detach(thread);
    ++num_workers_;
    return true;
  }

  std::mutex caller_;
  std::mutex mutex_;  // guards what follows, except that a running job's own fields stand still
  std::condition_variable work_;
  std::condition_variable done_;
  int num_workers_ = 0;
  int num_running_ = 0;
  int places_ = 0;  // workers that may still join the job
  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t num_tasks_ = 0;
  std::atomic<int64_t> next_{0};
};

// Never destroyed: its workers sleep in it until the process ends.
std::atomic<Pool*> the_pool{nullptr};

void forget_pool() { the_pool.store(nullptr, std::memory_order_relaxed); }

Pool* pool() {
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  static std::once_flag registered;
  std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
  Pool* made = new (std::nothrow) Pool;
  if (made == nullptr) return nullptr;
  if (the_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return made;
  delete made;
  return found;
}

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, Task task, void* context) {
  const int64_t wanted = num_tasks < num_threads ? num_tasks : num_threads;
  if (wanted > 1) {
    Pool* threads = pool();
    if (threads && threads->try_run(num_tasks, static_cast<int>(wanted) - 1, task, context)) return;
  }
  for (int64_t index = 0; index < num_tasks; ++index) task(context, index);
}

}  // namespace hfs
