// Drives csrc/aio.cpp, built with sanitizers by test_aio_native.py: DRIVER DIRECTORY BACKEND DIRECT
//
// Prints the names of the cases that passed; on the first failure says where, and exits 1. Exits 77
// where the kernel refuses io_uring.
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "aio.h"

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                                \
    }                                                                         \
  } while (0)

namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kBlock = 16 * kPage;

struct Options {
  std::string directory;
  int32_t backend;
  bool direct;
};

struct Close {
  void operator()(HfsAioQueue* queue) const { hfs_aio_queue_close(queue); }
  void operator()(HfsAioFile* file) const { hfs_aio_file_close(file); }
  void operator()(HfsAioTicket* ticket) const { hfs_aio_ticket_free(ticket); }
};
using QueueHandle = std::unique_ptr<HfsAioQueue, Close>;
using FileHandle = std::unique_ptr<HfsAioFile, Close>;
using TicketHandle = std::unique_ptr<HfsAioTicket, Close>;

struct Opened {
  FileHandle file;
  std::vector<int32_t> fds;
};

int new_fd(const Options& options, int64_t nbytes) {
  static int count = 0;
  const std::string path = options.directory + "/part" + std::to_string(count++);
  const int flags = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | (options.direct ? O_DIRECT : 0);
  const int fd = open(path.c_str(), flags, 0600);
  CHECK(fd >= 0);
  CHECK(unlink(path.c_str()) == 0);
  CHECK(ftruncate(fd, nbytes) == 0);
  return fd;
}

Opened new_file(const Options& options, int parts, int64_t part_bytes, int64_t stripe_bytes) {
  Opened opened;
  for (int i = 0; i < parts; ++i) opened.fds.push_back(new_fd(options, part_bytes));
  const int64_t align = options.direct ? hfs_aio_memory_align(opened.fds[0]) : 1;
  CHECK(align > 0);
  opened.file.reset(hfs_aio_file_open(opened.fds.data(), parts, stripe_bytes, align));
  CHECK(opened.file != nullptr);
  return opened;
}

QueueHandle new_queue(const Options& options, int32_t depth) {
  int32_t error = 0;
  QueueHandle queue(hfs_aio_queue_open(depth, kBlock, options.backend, &error));
  CHECK(queue != nullptr && error == 0);
  CHECK(hfs_aio_queue_backend(queue.get()) == options.backend);
  return queue;
}

TicketHandle submit(const QueueHandle& queue, const Opened& opened, bool is_write, char* memory,
                    int64_t nbytes, int64_t offset) {
  TicketHandle ticket(
      hfs_aio_submit(queue.get(), opened.file.get(), is_write, memory, nbytes, offset));
  CHECK(ticket != nullptr);
  return ticket;
}

HfsAioFault finish(const TicketHandle& ticket) {
  CHECK(hfs_aio_ticket_wait(ticket.get(), 20000) == HFS_AIO_DONE);
  HfsAioFault fault;
  hfs_aio_ticket_fault(ticket.get(), &fault);
  return fault;
}

HfsAioFault move(const QueueHandle& queue, const Opened& opened, bool is_write, char* memory,
                 int64_t nbytes, int64_t offset) {
  return finish(submit(queue, opened, is_write, memory, nbytes, offset));
}

std::vector<char> random_bytes(int64_t count, unsigned seed) {
  std::minstd_rand random(seed);
  std::vector<char> bytes(static_cast<size_t>(count));
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

// Any length, any memory, any stripes: what is read is what was written, and nothing beside it.
void round_trips(const Options& options) {
  std::minstd_rand random(7);
  for (int parts = 1; parts <= 3; ++parts) {
    const int64_t rows = 64 * kPage;
    const Opened opened = new_file(options, parts, rows, 3 * kPage);
    const QueueHandle queue = new_queue(options, 1 + 3 * (parts - 1));
    for (int round = 0; round < 20; ++round) {
      const int64_t offset = static_cast<int64_t>(random() % 20) * kPage;
      const int64_t nbytes = static_cast<int64_t>(random() % (40 * kPage));
      const size_t shift = round % 3 == 0 ? 0 : random() % 64;
      std::vector<char> source = random_bytes(nbytes + 64, random());
      CHECK(move(queue, opened, true, source.data() + shift, nbytes, offset).error == 0);
      std::vector<char> target(static_cast<size_t>(nbytes) + 128, 'x');
      CHECK(move(queue, opened, false, target.data() + shift, nbytes, offset).error == 0);
      const size_t count = static_cast<size_t>(nbytes);
      CHECK(memcmp(target.data() + shift, source.data() + shift, count) == 0);
      for (size_t i = 0; i < shift; ++i) CHECK(target[i] == 'x');
      for (size_t i = shift + count; i < target.size(); ++i) CHECK(target[i] == 'x');
    }
  }
}

// The last page of a write ends in zeros, and the page after it stays.
void tails_are_padded(const Options& options) {
  const Opened opened = new_file(options, 1, 4 * kPage, kBlock);
  const QueueHandle queue = new_queue(options, 2);
  std::vector<char> page(4 * kPage, 'a');
  CHECK(move(queue, opened, true, page.data(), 4 * kPage, 0).error == 0);
  CHECK(move(queue, opened, true, page.data(), kPage + 1, kPage).error == 0);
  CHECK(move(queue, opened, false, page.data(), 4 * kPage, 0).error == 0);
  CHECK(page[2 * kPage] == 'a' && page[2 * kPage + 1] == 0 && page[3 * kPage - 1] == 0);
  CHECK(page[3 * kPage] == 'a');
}

void many_threads(const Options& options) {
  constexpr int kThreads = 4;
  constexpr int64_t kEach = 6 * kBlock;
  const Opened opened = new_file(options, 2, kThreads * kEach, kBlock);
  const QueueHandle queue = new_queue(options, 4);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::vector<char> source = random_bytes(kEach, t + 1);
      std::vector<char> target(static_cast<size_t>(kEach));
      std::vector<TicketHandle> tickets;
      const int64_t base = static_cast<int64_t>(t) * kEach;
      for (int64_t at = 0; at < kEach; at += kBlock / 2) {
        tickets.push_back(submit(queue, opened, true, source.data() + at, kBlock / 2, base + at));
      }
      for (const TicketHandle& ticket : tickets) CHECK(finish(ticket).error == 0);
      CHECK(move(queue, opened, false, target.data(), kEach, base).error == 0);
      CHECK(source == target);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void truncated_file_is_an_error(const Options& options) {
  const Opened opened = new_file(options, 1, 8 * kBlock, 8 * kBlock);
  const QueueHandle queue = new_queue(options, 2);
  CHECK(ftruncate(opened.fds[0], kBlock + 100) == 0);
  std::vector<char> memory(8 * kBlock);
  const HfsAioFault fault = move(queue, opened, false, memory.data(), 8 * kBlock, 0);
  CHECK(fault.error == EIO && fault.part == 0 && fault.position >= kBlock);
  CHECK(fault.moved < fault.asked);
  CHECK(move(queue, opened, false, memory.data(), kBlock, 0).error == 0);
  CHECK(move(queue, opened, false, memory.data(), kBlock, 4 * kBlock).error == EIO);
}

void full_disk_is_an_error(const Options& options) {
  const int fd = open("/dev/full", O_RDWR | O_CLOEXEC);
  CHECK(fd >= 0);
  const QueueHandle queue = new_queue(options, 2);
  std::vector<char> memory(20 * kBlock);
  const Opened opened{FileHandle(hfs_aio_file_open(&fd, 1, kBlock, 1)), {fd}};
  const HfsAioFault fault = move(queue, opened, true, memory.data(), 20 * kBlock, 0);
  CHECK(fault.error == ENOSPC && fault.moved == 0);
}

void file_size_limit_is_an_error(const Options& options) {
  const Opened opened = new_file(options, 1, 4 * kBlock, 4 * kBlock);
  const QueueHandle queue = new_queue(options, 2);
  rlimit old;
  CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
  const rlimit tight = {static_cast<rlim_t>(2 * kBlock), old.rlim_max};
  CHECK(setrlimit(RLIMIT_FSIZE, &tight) == 0);
  std::vector<char> memory(4 * kBlock);
  CHECK(move(queue, opened, true, memory.data(), 4 * kBlock, 0).error == EFBIG);
  CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
  CHECK(move(queue, opened, true, memory.data(), 4 * kBlock, 0).error == 0);
}

// Everything is let go of while I/O is in flight; the memory outlives the queue, as it must.
void closing_finishes_what_was_submitted(const Options& options) {
  std::vector<char> source = random_bytes(64 * kBlock, 3);
  Opened opened = new_file(options, 2, 64 * kBlock, kBlock);
  const int kept = dup(opened.fds[0]);
  QueueHandle queue = new_queue(options, 4);
  submit(queue, opened, true, source.data(), 64 * kBlock, 0).reset();
  const TicketHandle late = submit(queue, opened, false, source.data(), 0, 0);
  opened.file.reset();
  queue.reset();
  CHECK(hfs_aio_ticket_wait(late.get(), 0) == HFS_AIO_DONE);
  CHECK(fcntl(opened.fds[0], F_GETFD) == -1);  // closed with the last ticket
  std::unique_ptr<char, decltype(&free)> block(static_cast<char*>(aligned_alloc(kPage, kBlock)),
                                               &free);
  CHECK(pread(kept, block.get(), kBlock, 31 * kBlock) == kBlock);
  CHECK(memcmp(block.get(), source.data() + 62 * kBlock, kBlock) == 0);
  close(kept);
}

void a_fork_is_kept_out(const Options& options) {
  const Opened opened = new_file(options, 1, 64 * kBlock, kBlock);
  QueueHandle queue = new_queue(options, 2);
  std::vector<char> memory(64 * kBlock, 'p');
  TicketHandle ticket = submit(queue, opened, true, memory.data(), 64 * kBlock, 0);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    const int32_t state = hfs_aio_ticket_wait(ticket.get(), 1000);
    if (state != HFS_AIO_FORKED && state != HFS_AIO_DONE) _exit(2);
    if (hfs_aio_submit(queue.get(), opened.file.get(), 1, memory.data(), 1, 0) != nullptr) {
      _exit(3);
    }
    ticket.reset();
    queue.reset();
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(finish(ticket).error == 0);
  memory.assign(memory.size(), 'q');
  CHECK(move(queue, opened, false, memory.data(), 64 * kBlock, 0).error == 0);
  CHECK(memory.front() == 'p' && memory.back() == 'p');
}

void bad_arguments_are_refused(const Options& options) {
  int32_t error = 0;
  CHECK(hfs_aio_queue_open(0, kBlock, options.backend, &error) == nullptr && error == EINVAL);
  CHECK(hfs_aio_queue_open(1, kPage + 1, options.backend, &error) == nullptr && error == EINVAL);
  const int32_t fd = 0;
  CHECK(hfs_aio_file_open(&fd, 0, kPage, 1) == nullptr);
  CHECK(hfs_aio_file_open(&fd, 1, kPage + 1, 1) == nullptr);
  const Opened opened = new_file(options, 1, kPage, kPage);
  const QueueHandle queue = new_queue(options, 1);
  char byte = 0;
  CHECK(hfs_aio_submit(queue.get(), opened.file.get(), 1, &byte, 1, 1) == nullptr);
  CHECK(hfs_aio_submit(queue.get(), opened.file.get(), 1, &byte, 1, -kPage) == nullptr);
  CHECK(hfs_aio_submit(queue.get(), opened.file.get(), 1, &byte, -1, 0) == nullptr);
}

}  // namespace

int main(int count, char** words) {
  CHECK(count == 4);
  signal(SIGXFSZ, SIG_IGN);
  const Options options = {words[1], atoi(words[2]), strcmp(words[3], "direct") == 0};
  int32_t error = 0;
  const QueueHandle probe(hfs_aio_queue_open(1, kBlock, options.backend, &error));
  if (probe == nullptr && options.backend == HFS_AIO_URING) return 77;
  const struct {
    const char* name;
    void (*run)(const Options&);
  } cases[] = {
      {"round_trips", round_trips},
      {"tails_are_padded", tails_are_padded},
      {"many_threads", many_threads},
      {"truncated_file_is_an_error", truncated_file_is_an_error},
      {"full_disk_is_an_error", full_disk_is_an_error},
      {"file_size_limit_is_an_error", file_size_limit_is_an_error},
      {"closing_finishes_what_was_submitted", closing_finishes_what_was_submitted},
      {"a_fork_is_kept_out", a_fork_is_kept_out},
      {"bad_arguments_are_refused", bad_arguments_are_refused},
  };
  for (const auto& each : cases) {
    each.run(options);
    printf("%s\n", each.name);
    fflush(stdout);
  }
  return 0;
}
