// One io_uring, by its system calls: liburing would be one more thing to install.
//
//   push(op, ...) x n  ->  enter(): hand over, sleep until something completed  ->  pop() x m
//
// Used by one thread only, the one that opened it. "Efficient IO with io_uring", J. Axboe, 2019.
#ifndef HF_SPEED_AIO_RING_H_
#define HF_SPEED_AIO_RING_H_

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#if __has_include(<linux/io_uring.h>) && !defined(HFS_NO_IO_URING)
#include <linux/io_uring.h>
#endif

namespace hfs_aio {

enum class Op { kRead, kWrite };

}  // namespace hfs_aio

#ifdef IORING_FEAT_RW_CUR_POS  // headers of Linux 5.6 or later, the first that can read and write

// The headers may be older than the kernel that runs this.
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

namespace hfs_aio {

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
  void push(Op op, int fd, void* buffer, int64_t length, int64_t position, uint64_t tag) {
    const unsigned tail = *sq_tail_;
    io_uring_sqe* sqe = &sqes_[tail & sq_mask_];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = op == Op::kWrite ? IORING_OP_WRITE : IORING_OP_READ;
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
    void* found =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, offset);
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

}  // namespace hfs_aio

#else

namespace hfs_aio {

// Built where the system's headers do not know io_uring: says so, and the threads take over.
class Ring {
 public:
  int open(unsigned) { return ENOSYS; }
  int fd() const { return -1; }
  void push(Op, int, void*, int64_t, int64_t, uint64_t) {}
  void enter() {}
  bool pop(uint64_t*, int64_t*) { return false; }
};

}  // namespace hfs_aio

#endif  // IORING_FEAT_RW_CUR_POS
#endif  // HF_SPEED_AIO_RING_H_
