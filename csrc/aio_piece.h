// How a request becomes pieces: pure arithmetic, no system call.
//
//   Ticket (one request)  -> cut_piece -> Piece -> fill_bounce -> the kernel -> needs_more
//                                                                            -> empty_bounce
#ifndef HF_SPEED_AIO_PIECE_H_
#define HF_SPEED_AIO_PIECE_H_

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "aio.h"

namespace hfs_aio {

constexpr int64_t kPage = 4096;

inline int64_t round_up(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

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
inline void cut_piece(Ticket* ticket, int64_t block_bytes, Piece* piece) {
  const File& file = *ticket->file;
  const int64_t offset = ticket->offset + ticket->cut;
  const int64_t stripe = offset / file.stripe_bytes;
  const int64_t inside = offset % file.stripe_bytes;
  const int64_t parts = static_cast<int64_t>(file.fds.size());
  const int64_t left = ticket->nbytes - ticket->cut;
  int64_t useful = std::min({block_bytes, file.stripe_bytes - inside, left});
  piece->memory = ticket->memory + ticket->cut;
  const bool aligned =
      reinterpret_cast<uintptr_t>(piece->memory) % static_cast<uintptr_t>(file.memory_align) == 0;
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

inline void fill_bounce(Piece* piece) {
  if (piece->buffer == piece->memory || !piece->ticket->is_write) return;
  const size_t useful = static_cast<size_t>(piece->useful);
  memcpy(piece->bounce, piece->memory, useful);
  memset(piece->bounce + useful, 0, static_cast<size_t>(piece->length) - useful);
}

inline void empty_bounce(const Piece& piece) {
  if (piece.buffer == piece.memory || piece.ticket->is_write) return;
  memcpy(piece.memory, piece.bounce, static_cast<size_t>(piece.useful));
}

// Books what the kernel returned (bytes or -errno). Says whether the piece needs another call;
// where not, `error` is 0 or the errno.
inline bool needs_more(Piece* piece, int64_t result, int* error) {
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

}  // namespace hfs_aio
#endif  // HF_SPEED_AIO_PIECE_H_
