#include "aio.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/stat.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
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

// The headers may be older than the kernel that runs this.
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

namespace {

constexpr int64_t kPage = 4096;

int64_t round_up(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

struct File {
  std::vector<int> fds;
  int64_t stripe_bytes = 0;
  int64_t memory_align = 1;
  ~File() {
    for (int fd : fds) close(fd);
  }
};

class Queue;

// One read or write. `cut`, `in_flight` and `fault` are guarded by the queue's mutex until `done`.
struct Ticket {
  std::shared_ptr<Queue> queue;
  std::shared_ptr<File> file;
  bool is_write = false;
  char* memory = nullptr;
  int64_t nbytes = 0;
  int64_t offset = 0;
  int64_t cut = 0;  // bytes handed out in pieces
  int in_flight = 0;
  HfsAioFault fault{};
  std::atomic<bool> done{false};
};

// One block of a ticket on its way, in one of the queue's `depth` slots.
struct Piece {
  std::shared_ptr<Ticket> ticket;
  char* bounce = nullptr;  // the slot's own aligned block
  char* memory = nullptr;  // the caller's
  char* buffer = nullptr;  // one of the two: what the kernel sees
  int64_t useful = 0;      // bytes of the caller's
  int64_t length = 0;      // bytes of I/O: `useful`, padded to a page in the bounce block
  int64_t moved = 0;
  int64_t position = 0;  // in the descriptor
  int part = 0;

  int fd() const { return ticket->file->fds[static_cast<size_t>(part)]; }
};

// Cuts the next piece off `ticket`: never across a stripe, a partial page only alone in a bounce.
void cut_piece(Ticket* ticket, int64_t block_bytes, Piece* piece) {
  const File& file = *ticket->file;
  const int64_t offset = ticket->offset + ticket->cut;
  const int64_t stripe = offset / file.stripe_bytes;
  const int64_t inside = offset % file.stripe_bytes;
  const int64_t parts = static_cast<int64_t>(file.fds.size());
  const int64_t left = ticket->nbytes - ticket->cut;
  int64_t useful = std::min({block_bytes, file.stripe_bytes - inside, left});
  piece->memory = ticket->memory + ticket->cut;
  const bool aligned = reinterpret_cast<uintptr_t>(piece->memory) %
                           static_cast<uintptr_t>(file.memory_align) == 0;
  if (aligned && useful >= kPage) useful -= useful % kPage;
  piece->buffer = aligned && useful % kPage == 0 ? piece->memory : piece->bounce;
  piece->useful = useful;
  piece->length = round_up(useful);
  piece->moved = 0;
  piece->part = static_cast<int>(stripe % parts);
  piece->position = stripe / parts * file.stripe_bytes + inside;
  ticket->cut += useful;
  ticket->in_flight += 1;
}

void fill_bounce(Piece* piece) {
  if (piece->buffer == piece->memory || !piece->ticket->is_write) return;
  const size_t useful = static_cast<size_t>(piece->useful);
  memcpy(piece->bounce, piece->memory, useful);
  memset(piece->bounce + useful, 0, static_cast<size_t>(piece->length) - useful);
}

void empty_bounce(const Piece& piece) {
  if (piece.buffer == piece.memory || piece.ticket->is_write) return;
  memcpy(piece.memory, piece.bounce, static_cast<size_t>(piece.useful));
}

// Books what the kernel returned (bytes or -errno). Says whether the piece needs another call;
// where not, `error` is 0 or the errno.
bool needs_more(Piece* piece, int64_t result, int* error) {
  *error = 0;
  if (result == -EINTR || result == -EAGAIN) return true;
  if (result < 0) {
    *error = static_cast<int>(-result);
    return false;
  }
  if (piece->moved + result == piece->length) {
    piece->moved = piece->length;
    return false;
  }
  // O_DIRECT goes on from a page only. Where that is no progress, the file has ended.
  const int64_t usable = piece->ticket->file->memory_align > 1 ? result - result % kPage : result;
  if (usable == 0) {
    piece->moved += result;
    *error = EIO;
    return false;
  }
  piece->moved += usable;
  return true;
}

class Ring {
 public:
  // Returns 0 or an errno.
  int open(unsigned entries) {
    io_uring_params params;
    memset(&params, 0, sizeof params);
    params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    fd_ = setup(entries, &params);
    if (fd_ < 0 && errno == EINVAL) {  // before Linux 6.1
      memset(&params, 0, sizeof params);
      fd_ = setup(entries, &params);
    }
    if (fd_ < 0) return errno;
    if (!can_read_and_write() || !(params.features & IORING_FEAT_SINGLE_MMAP)) return EOPNOTSUPP;
    return map(params);
  }

  ~Ring() {
    if (sqes_ != nullptr) munmap(sqes_, sqes_bytes_);
    if (rings_ != nullptr) munmap(rings_, rings_bytes_);
    if (fd_ >= 0) close(fd_);
  }

  int fd() const { return fd_; }

  // Puts one operation in line. There is always room: entries > operations in flight.
  void push(uint8_t opcode, int fd, void* buffer, int64_t length, int64_t position,
            uint64_t tag) {
    const unsigned tail = *sq_tail_;
    io_uring_sqe* sqe = &sqes_[tail & sq_mask_];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = opcode;
    sqe->fd = fd;
    sqe->addr = reinterpret_cast<uint64_t>(buffer);
    sqe->len = static_cast<uint32_t>(length);
    sqe->off = static_cast<uint64_t>(position);
    sqe->user_data = tag;
    sq_array_[tail & sq_mask_] = tail & sq_mask_;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    to_submit_ += 1;
  }

  // Hands over what is in line and waits until something has completed.
  void enter() {
    for (;;) {
      const long count =
          syscall(__NR_io_uring_enter, fd_, to_submit_, 1U, IORING_ENTER_GETEVENTS, nullptr, 0);
      if (count >= 0) {
        to_submit_ -= static_cast<unsigned>(count);
        return;
      }
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EBUSY && errno != ENOMEM) give_up(errno);
      if (has_completion()) return;
      const timespec pause = {0, 1000000};
      nanosleep(&pause, nullptr);
    }
  }

  bool has_completion() const { return *cq_head_ != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE); }

  bool pop(uint64_t* tag, int64_t* result) {
    if (!has_completion()) return false;
    const io_uring_cqe& cqe = cqes_[*cq_head_ & cq_mask_];
    *tag = cqe.user_data;
    *result = cqe.res;
    __atomic_store_n(cq_head_, *cq_head_ + 1, __ATOMIC_RELEASE);
    return true;
  }

 private:
  static int setup(unsigned entries, io_uring_params* params) {
    return static_cast<int>(syscall(__NR_io_uring_setup, entries, params));
  }

  // The kernel may still be writing into memory of the caller's: going on could corrupt it.
  [[noreturn]] static void give_up(int error) {
    fprintf(stderr, "hf_speed: io_uring_enter failed with I/O in flight: %s\n", strerror(error));
    abort();
  }

  bool can_read_and_write() const {
    constexpr size_t kOps = 64;
    alignas(io_uring_probe) char memory[sizeof(io_uring_probe) + kOps * sizeof(io_uring_probe_op)];
    memset(memory, 0, sizeof memory);
    auto* probe = reinterpret_cast<io_uring_probe*>(memory);
    if (syscall(__NR_io_uring_register, fd_, IORING_REGISTER_PROBE, probe, kOps) < 0) return false;
    return probe->last_op >= IORING_OP_WRITE &&
           (probe->ops[IORING_OP_READ].flags & IO_URING_OP_SUPPORTED) &&
           (probe->ops[IORING_OP_WRITE].flags & IO_URING_OP_SUPPORTED);
  }

  int map(const io_uring_params& params) {
    rings_bytes_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                    params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    char* rings = static_cast<char*>(map_ring(rings_bytes_, IORING_OFF_SQ_RING));
    if (rings == nullptr) return ENOMEM;
    rings_ = rings;
    sqes_ = static_cast<io_uring_sqe*>(map_ring(sqes_bytes_, IORING_OFF_SQES));
    if (sqes_ == nullptr) return ENOMEM;
    const auto word = [&](uint32_t offset) { return reinterpret_cast<unsigned*>(rings + offset); };
    sq_tail_ = word(params.sq_off.tail);
    sq_mask_ = *word(params.sq_off.ring_mask);
    sq_array_ = word(params.sq_off.array);
    cq_head_ = word(params.cq_off.head);
    cq_tail_ = word(params.cq_off.tail);
    cq_mask_ = *word(params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(rings + params.cq_off.cqes);
    return 0;
  }

  void* map_ring(size_t bytes, off_t offset) const {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_,
                       offset);
    if (found == MAP_FAILED) return nullptr;
    madvise(found, bytes, MADV_DONTFORK);
    return found;
  }

  int fd_ = -1;
  void* rings_ = nullptr;
  size_t rings_bytes_ = 0;
  io_uring_sqe* sqes_ = nullptr;
  size_t sqes_bytes_ = 0;
  unsigned* sq_tail_ = nullptr;
  unsigned* sq_array_ = nullptr;
  unsigned sq_mask_ = 0;
  unsigned* cq_head_ = nullptr;
  unsigned* cq_tail_ = nullptr;
  unsigned cq_mask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
  unsigned to_submit_ = 0;
};

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

  size_t bounce_bytes() const { return slots_.size() * static_cast<size_t>(block_bytes_); }

  // Pages that no unaligned request ever touches are never backed by memory.
  int map_bounce() {
    if (bounce_ != nullptr) return 0;
    void* found = mmap(nullptr, bounce_bytes(), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return errno;
    madvise(found, bounce_bytes(), MADV_DONTFORK);
    bounce_ = static_cast<char*>(found);
    for (size_t i = 0; i < slots_.size(); ++i) {
      slots_[i].bounce = bounce_ + i * static_cast<size_t>(block_bytes_);
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
    } catch (const std::system_error& failure) {
      stop();
      return failure.code().value();
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
    std::lock_guard<std::mutex> lock(mutex_);
    ticket->in_flight -= 1;
    if (error != 0 && ticket->fault.error == 0) {
      ticket->fault = {error, slot->part, slot->position, slot->length, slot->moved};
      ticket->cut = ticket->nbytes;  // nothing more of it is started
    }
    if (ticket->in_flight == 0 && ticket->cut == ticket->nbytes) {
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
        const ssize_t result = slot->ticket->is_write
                                   ? pwrite(slot->fd(), buffer, length, position)
                                   : pread(slot->fd(), buffer, length, position);
        more = needs_more(slot, result < 0 ? -errno : result, &error);
      }
      settle(slot, error);
    }
  }

  void push(Ring* ring, size_t index) {
    Piece& slot = slots_[index];
    ring->push(slot.ticket->is_write ? IORING_OP_WRITE : IORING_OP_READ, slot.fd(),
               slot.buffer + slot.moved, slot.length - slot.moved, slot.position + slot.moved,
               index);
  }

  void listen(Ring* ring) {
    ring->push(IORING_OP_READ, bell_, &bell_count_, sizeof bell_count_, 0, kBell);
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
  int bell_ = -1;     // an eventfd: wakes the thread that sleeps in the ring
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

}  // namespace

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
    ticket->file = file->held;
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
