// Asynchronous file I/O: reads and writes cut into blocks, many in flight, errors on the ticket.
//
// A queue owns one io_uring and the one thread that talks to it, or, where the kernel refuses
// io_uring, `depth` threads that call pread and pwrite. A file is one row of bytes striped over
// several descriptors. A submit returns a ticket at once; waiting on it tells how it ended.
//
// Rules: offsets are multiples of 4096. The last block of a write is padded with zeros to 4096
// bytes. Memory that is aligned for the file goes to the kernel as it is, other memory through one
// of `depth` fixed blocks of the queue. Tickets run in any order: wait for one before submitting
// another on the same bytes. The memory must live until the ticket is done.
//
// A forked child has neither the parent's threads nor its ring: every call on the parent's queue
// says so and touches nothing.
//
// All functions are thread-safe. None throws.
#ifndef HF_SPEED_AIO_H_
#define HF_SPEED_AIO_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct HfsAioQueue HfsAioQueue;
typedef struct HfsAioFile HfsAioFile;
typedef struct HfsAioTicket HfsAioTicket;

enum { HFS_AIO_AUTO = 0, HFS_AIO_URING = 1, HFS_AIO_THREADS = 2 };
enum { HFS_AIO_PENDING = 0, HFS_AIO_DONE = 1, HFS_AIO_FORKED = -1 };

// The first failure of a ticket. `error` is 0 if there was none.
typedef struct HfsAioFault {
  int32_t error;     // errno; EIO where the kernel moved fewer bytes than asked and no error
  int32_t part;      // which descriptor of the file
  int64_t position;  // where in that descriptor
  int64_t asked;     // bytes
  int64_t moved;     // bytes, of those asked
} HfsAioFault;

// Opens a queue of `depth` blocks in flight, at most `block_bytes` (a multiple of 4096) each.
// Returns null and the errno in `error` on failure; with HFS_AIO_AUTO a queue may come with an
// errno too: why io_uring was not used.
HfsAioQueue* hfs_aio_queue_open(int32_t depth, int64_t block_bytes, int32_t backend,
                                int32_t* error);
// HFS_AIO_URING or HFS_AIO_THREADS.
int32_t hfs_aio_queue_backend(const HfsAioQueue* queue);
// Finishes what was submitted, ends the threads, frees the queue.
void hfs_aio_queue_close(HfsAioQueue* queue);

// Takes over `num_fds` descriptors. Stripe k of `stripe_bytes` lies on descriptor k % num_fds.
// `memory_align`: what the kernel wants of memory for O_DIRECT; 1 for buffered descriptors.
// Returns null where memory is out; the descriptors then stay the caller's.
HfsAioFile* hfs_aio_file_open(const int32_t* fds, int32_t num_fds, int64_t stripe_bytes,
                              int64_t memory_align);
// Closes the descriptors when the last ticket on them is done.
void hfs_aio_file_close(HfsAioFile* file);
// What O_DIRECT on `fd` wants of memory, in bytes; 4096 where the kernel does not say; 0 where it
// cannot be used, or wants offsets aligned to more than 4096.
int64_t hfs_aio_memory_align(int32_t fd);

// Starts moving `nbytes` between `memory` and the file at `offset`. Returns null where memory is
// out, the offset is not a multiple of 4096, or the queue belongs to a parent process.
HfsAioTicket* hfs_aio_submit(HfsAioQueue* queue, HfsAioFile* file, int32_t is_write, void* memory,
                             int64_t nbytes, int64_t offset);
// Waits at most `timeout_ms` (0: only looks): HFS_AIO_PENDING, HFS_AIO_DONE or HFS_AIO_FORKED.
int32_t hfs_aio_ticket_wait(HfsAioTicket* ticket, int32_t timeout_ms);
// Tells how a ticket that is done ended.
void hfs_aio_ticket_fault(const HfsAioTicket* ticket, HfsAioFault* fault);
// Forgets a ticket; I/O in flight goes on.
void hfs_aio_ticket_free(HfsAioTicket* ticket);

#ifdef __cplusplus
}
#endif
#endif  // HF_SPEED_AIO_H_
