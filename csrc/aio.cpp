#include "aio.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "aio_piece.h"
#include "aio_ring.h"

namespace hfs_aio {

constexpr size_t kHugePage = size_t{2} << 20;

class Queue {
 public:
  Queue(int depth, int64_t block_bytes) : block_bytes_(block_bytes), slots_(depth) {}

  // Returns 0 or an errno; after a failure the queue can be started again with another backend.
  int start(int backend) {
    if (const int error = map_bounce()) return error;
    backend_ = backend;
    return backend == HFS_AIO_URING ? start_ring() : start_workers();
  }

  ~Queue() {
    if (bounce_ != nullptr) munmap(bounce_, bounce_bytes());
    if (bell_ >= 0) close(bell_);
  }

  int backend() const { return backend_; }
  bool is_foreign() const { return getpid() != pid_; }

  void submit(const std::shared_ptr<Ticket>& ticket) {
    bool ring_bell = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      waiting_.push_back(ticket);
      ring_bell = backend_ == HFS_AIO_URING && !rung_;
      rung_ = rung_ || ring_bell;
    }
    wake(ring_bell);
  }

  bool wait(const Ticket& ticket, int timeout_ms) {
    std::unique_lock<std::mutex> lock(mutex_);
    return finished_.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                              [&] { return ticket.done.load(); });
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake(backend_ == HFS_AIO_URING);
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  // In a forked child: gives back what the child inherited, touches nothing the parent uses.
  void abandon() {
    if (bell_ >= 0) close(bell_);
    if (ring_fd_ >= 0) close(ring_fd_);
    bell_ = ring_fd_ = -1;
  }

 private:
  static constexpr uint64_t kBell = ~uint64_t{0};

  // Room to start on a huge page. What no unaligned request ever touches takes no memory.
  size_t bounce_bytes() const {
    return slots_.size() * static_cast<size_t>(block_bytes_) + kHugePage;
  }

  int map_bounce() {
    if (bounce_ != nullptr) return 0;
    void* found = mmap(nullptr, bounce_bytes(), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return errno;
    bounce_ = static_cast<char*>(found);
    madvise(found, bounce_bytes(), MADV_DONTFORK);
    const uintptr_t start = reinterpret_cast<uintptr_t>(found);
    const size_t skip = (kHugePage - start % kHugePage) % kHugePage;
    const size_t huge = (bounce_bytes() - kHugePage) / kHugePage * kHugePage;
    if (huge > 0) madvise(bounce_ + skip, huge, MADV_HUGEPAGE);
    for (size_t i = 0; i < slots_.size(); ++i) {
      slots_[i].bounce = bounce_ + skip + i * static_cast<size_t>(block_bytes_);
    }
    return 0;
  }

  // Signals are for the threads of the program, so ours block them all.
  template <typename Body>
  void spawn(Body body) {
    sigset_t all;
    sigset_t old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    try {
      threads_.emplace_back(body);
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &old, nullptr);
      throw;
    }
    pthread_setname_np(threads_.back().native_handle(), "hf_speed_aio");
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
  }

  int start_ring() {
    bell_ = eventfd(0, EFD_CLOEXEC);
    if (bell_ < 0) return errno;
    int error = -1;  // guarded by mutex_; -1: not known yet
    spawn([this, &error] {
      Ring ring;  // made here: the kernel lets only its maker submit
      const int opened = ring.open(static_cast<unsigned>(slots_.size()) + 1);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        ring_fd_ = ring.fd();
        error = opened;
        finished_.notify_all();
      }
      if (opened == 0) serve_ring(&ring);
    });
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [&] { return error >= 0; });
    if (error == 0) return 0;
    lock.unlock();
    threads_.back().join();
    threads_.clear();
    close(bell_);
    bell_ = ring_fd_ = -1;
    return error;
  }

  int start_workers() {
    try {
      for (Piece& slot : slots_) {
        spawn([this, &slot] { serve_slot(&slot); });
      }
    } catch (...) {
      stop();
      throw;
    }
    return 0;
  }

  void wake(bool ring_bell) {
    if (!ring_bell) {
      work_.notify_all();
      return;
    }
    const uint64_t one = 1;
    while (write(bell_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

  // mutex_ held. False: nothing to do.
  bool take(Piece* slot) {
    while (!waiting_.empty() && waiting_.front()->cut == waiting_.front()->nbytes) {
      waiting_.pop_front();
    }
    if (waiting_.empty()) return false;
    slot->ticket = waiting_.front();
    cut_piece(slot->ticket.get(), block_bytes_, slot);
    return true;
  }

  void settle(Piece* slot, int error) {
    if (error == 0) empty_bounce(*slot);
    const std::shared_ptr<Ticket> ticket = std::move(slot->ticket);
    std::shared_ptr<File> file;  // the last one closes the descriptors, after the lock is let go
    std::lock_guard<std::mutex> lock(mutex_);
    ticket->in_flight -= 1;
    if (error != 0 && ticket->fault.error == 0) {
      ticket->fault = {error, slot->part, slot->position, slot->length, slot->moved};
      ticket->cut = ticket->nbytes;  // nothing more of it is started
    }
    if (ticket->in_flight == 0 && ticket->cut == ticket->nbytes) {
      file = std::move(ticket->file);
      ticket->done.store(true);
      finished_.notify_all();
    }
  }

  void serve_slot(Piece* slot) {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        bool taken = false;
        work_.wait(lock, [&] { return (taken = take(slot)) || stopping_; });
        if (!taken) return;
      }
      fill_bounce(slot);
      int error = 0;
      bool more = true;
      while (more) {
        char* buffer = slot->buffer + slot->moved;
        const size_t length = static_cast<size_t>(slot->length - slot->moved);
        const off_t position = slot->position + slot->moved;
        const ssize_t result = slot->ticket->is_write ? pwrite(slot->fd(), buffer, length, position)
                                                      : pread(slot->fd(), buffer, length, position);
        more = needs_more(slot, result < 0 ? -errno : result, &error);
      }
      settle(slot, error);
    }
  }

  void push(Ring* ring, size_t index) {
    Piece& slot = slots_[index];
    ring->push(slot.ticket->is_write ? Op::kWrite : Op::kRead, slot.fd(), slot.buffer + slot.moved,
               slot.length - slot.moved, slot.position + slot.moved, index);
  }

  void listen(Ring* ring) {
    ring->push(Op::kRead, bell_, &bell_count_, sizeof bell_count_, 0, kBell);
  }

  void serve_ring(Ring* ring) {
    std::vector<size_t> free_slots;
    for (size_t i = slots_.size(); i-- > 0;) free_slots.push_back(i);
    listen(ring);
    for (;;) {
      while (!free_slots.empty()) {
        const size_t index = free_slots.back();
        {
          std::lock_guard<std::mutex> lock(mutex_);
          if (!take(&slots_[index])) {
            if (stopping_ && free_slots.size() == slots_.size()) return;
            break;
          }
        }
        free_slots.pop_back();
        fill_bounce(&slots_[index]);
        push(ring, index);
      }
      ring->enter();
      uint64_t tag = 0;
      int64_t result = 0;
      while (ring->pop(&tag, &result)) {
        int error = 0;
        if (tag == kBell) {
          listen(ring);
          std::lock_guard<std::mutex> lock(mutex_);
          rung_ = false;
        } else if (needs_more(&slots_[tag], result, &error)) {
          push(ring, tag);
        } else {
          settle(&slots_[tag], error);
          free_slots.push_back(tag);
        }
      }
    }
  }

  const int64_t block_bytes_;
  const pid_t pid_ = getpid();
  int backend_ = HFS_AIO_THREADS;
  char* bounce_ = nullptr;
  int bell_ = -1;            // an eventfd: wakes the thread that sleeps in the ring
  uint64_t bell_count_ = 0;  // read by the kernel into here, at the latest when its thread ends
  int ring_fd_ = -1;         // for abandon() only
  std::vector<std::thread> threads_;
  std::vector<Piece> slots_;  // each touched by one thread

  std::mutex mutex_;  // guards what follows, and the tickets
  std::condition_variable work_;
  std::condition_variable finished_;
  std::deque<std::shared_ptr<Ticket>> waiting_;
  bool rung_ = false;  // the bell was rung and the ring's thread has not looked since
  bool stopping_ = false;
};

}  // namespace hfs_aio

using hfs_aio::File;
using hfs_aio::kPage;
using hfs_aio::Queue;
using hfs_aio::Ticket;

struct HfsAioQueue {
  std::shared_ptr<Queue> held;
};
struct HfsAioFile {
  std::shared_ptr<File> held;
};
struct HfsAioTicket {
  std::shared_ptr<Ticket> held;
};

HfsAioQueue* hfs_aio_queue_open(int32_t depth, int64_t block_bytes, int32_t backend,
                                int32_t* error) {
  *error = EINVAL;
  if (depth < 1 || block_bytes < kPage || block_bytes % kPage != 0) return nullptr;
  try {
    auto opened = std::make_unique<HfsAioQueue>();
    opened->held = std::make_shared<Queue>(depth, block_bytes);
    *error = opened->held->start(backend == HFS_AIO_THREADS ? HFS_AIO_THREADS : HFS_AIO_URING);
    if (*error == 0) return opened.release();
    if (backend != HFS_AIO_AUTO) return nullptr;
    const int failed = opened->held->start(HFS_AIO_THREADS);
    if (failed == 0) return opened.release();
    *error = failed;
  } catch (const std::system_error& failure) {
    *error = failure.code().value();
  } catch (const std::exception&) {
    *error = ENOMEM;
  }
  return nullptr;
}

int32_t hfs_aio_queue_backend(const HfsAioQueue* queue) { return queue->held->backend(); }

void hfs_aio_queue_close(HfsAioQueue* queue) {
  if (queue->held->is_foreign()) {
    // Destroying threads and waited-on locks of another process is undefined: the child's copy
    // of the object is left alone.
    queue->held->abandon();
    return;
  }
  queue->held->stop();
  delete queue;
}

HfsAioFile* hfs_aio_file_open(const int32_t* fds, int32_t num_fds, int64_t stripe_bytes,
                              int64_t memory_align) {
  if (num_fds < 1 || stripe_bytes < kPage || stripe_bytes % kPage != 0 || memory_align < 1) {
    return nullptr;
  }
  try {
    auto opened = std::make_unique<HfsAioFile>();
    auto file = std::make_shared<File>();
    file->stripe_bytes = stripe_bytes;
    file->memory_align = memory_align;
    file->fds.assign(fds, fds + num_fds);
    opened->held = std::move(file);
    return opened.release();
  } catch (const std::exception&) {
    return nullptr;
  }
}

void hfs_aio_file_close(HfsAioFile* file) { delete file; }

int64_t hfs_aio_memory_align(int32_t fd) {
  if (!(fcntl(fd, F_GETFL) & O_DIRECT)) return 0;
#ifdef STATX_DIOALIGN
  struct statx found;
  memset(&found, 0, sizeof found);
  if (syscall(__NR_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &found) == 0 &&
      (found.stx_mask & STATX_DIOALIGN)) {
    const bool fits = found.stx_dio_offset_align <= kPage && found.stx_dio_mem_align <= kPage;
    return fits ? found.stx_dio_mem_align : 0;
  }
#endif
  return kPage;
}

HfsAioTicket* hfs_aio_submit(HfsAioQueue* queue, HfsAioFile* file, int32_t is_write, void* memory,
                             int64_t nbytes, int64_t offset) {
  if (queue->held->is_foreign() || nbytes < 0 || offset < 0 || offset % kPage != 0) return nullptr;
  try {
    auto made = std::make_unique<HfsAioTicket>();
    auto ticket = std::make_shared<Ticket>();
    ticket->queue = queue->held;
    if (nbytes > 0) ticket->file = file->held;
    ticket->is_write = is_write != 0;
    ticket->memory = static_cast<char*>(memory);
    ticket->nbytes = nbytes;
    ticket->offset = offset;
    made->held = ticket;
    ticket->done.store(nbytes == 0);
    if (nbytes > 0) queue->held->submit(ticket);
    return made.release();
  } catch (const std::exception&) {
    return nullptr;
  }
}

int32_t hfs_aio_ticket_wait(HfsAioTicket* ticket, int32_t timeout_ms) {
  const Ticket& held = *ticket->held;
  if (held.done.load()) return HFS_AIO_DONE;
  if (held.queue->is_foreign()) return HFS_AIO_FORKED;
  if (timeout_ms <= 0) return HFS_AIO_PENDING;
  return held.queue->wait(held, timeout_ms) ? HFS_AIO_DONE : HFS_AIO_PENDING;
}

void hfs_aio_ticket_fault(const HfsAioTicket* ticket, HfsAioFault* fault) {
  *fault = ticket->held->fault;
}

void hfs_aio_ticket_free(HfsAioTicket* ticket) { delete ticket; }
