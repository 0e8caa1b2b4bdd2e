#include "connection.h"

#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace crosspool {

Connection::Connection(LinkMemory memory, LinkEnd end, int lost)
    : memory_(memory), end_(end), lost_(lost) {
  if (end == LinkEnd::kAttention) memory.link->combined.store(kUnheard);
}

Connection::~Connection() {
  if (socket_ >= 0) close(socket_);
  if (const int socket = handed_.load(); socket >= 0) close(socket);
}

void Connection::hand_over(int socket) {
  if (const int unseen = handed_.exchange(socket, std::memory_order_acq_rel); unseen >= 0) {
    close(unseen);
  }
}

ConnectionStatus Connection::status() const {
  ConnectionStatus found{};
  found.losses = losses_.load(std::memory_order_acquire);
  found.open = open_.load(std::memory_order_relaxed) ? 1 : 0;
  found.reason = reason_.load(std::memory_order_relaxed);
  found.error = error_.load(std::memory_order_relaxed);
  return found;
}

void Connection::publish() {
  if (handed_.load(std::memory_order_relaxed) >= 0) take_socket();
  if (socket_ >= 0) send();
}

bool Connection::progress() {
  publish();
  if (socket_ < 0) return false;
  if (!resumed_ || may_receive()) return receive();
  return receive_nothing();
}

void Connection::take_socket() {
  if (socket_ >= 0) close(socket_);
  socket_ = handed_.exchange(-1, std::memory_order_acq_rel);
  open_.store(false, std::memory_order_relaxed);
  registered = false;
  armed.store(false, std::memory_order_relaxed);
  message_bytes_ = sent_bytes_ = header_bytes_ = row_bytes_ = 0;
  told_ = resumed_ = false;
  epoch_ = 0;
}

// Whether it is the peer's turn. Before it has told its numbers, it always is.
bool Connection::may_receive() const {
  if (!resumed_) return true;
  const bool outstanding = number_of_dispatch() != number_of_reply();
  return outstanding == (end_ == LinkEnd::kAttention);
}

// Begins to send what comes next; returns false when there is nothing.
bool Connection::next_message() {
  const Link& link = *memory_.link;
  out_ = {};
  out_rows_ = nullptr;
  if (!told_) {
    told_ = true;
    out_.kind = MessageKind::kState;
    out_.sequence = number_of_dispatch();
    out_.epoch = told_reply_ = number_of_reply();
  } else if (!resumed_) {
    return false;
  } else if (end_ == LinkEnd::kAttention) {
    if (number_of_dispatch() == published_) return false;
    published_ = number_of_dispatch();
    out_ = {MessageKind::kDispatch,
            link.dispatch.model,
            published_,
            link.dispatch.epoch,
            link.dispatch.layer,
            link.dispatch.rows,
            link.dispatch.row_bytes,
            0};
    out_rows_ = memory_.dispatch_payload();
  } else {
    if (number_of_reply() == published_) return false;
    published_ = number_of_reply();
    out_ = {MessageKind::kReply,    0, published_, link.combine.epoch, 0, link.combine.rows,
            link.combine.row_bytes, 0};
    out_rows_ = memory_.combine_payload();
  }
  sent_bytes_ = 0;
  message_bytes_ = sizeof(out_) + std::size_t{out_.rows} * out_.row_bytes;
  return true;
}

void Connection::send() {
  while (is_sending() || next_message()) {
    iovec parts[2];
    std::size_t count = 0;
    if (sent_bytes_ < sizeof(out_)) {
      parts[count++] = {reinterpret_cast<unsigned char*>(&out_) + sent_bytes_,
                        sizeof(out_) - sent_bytes_};
    }
    const std::size_t rows = message_bytes_ - sizeof(out_);
    const std::size_t rows_sent = sent_bytes_ - std::min(sent_bytes_, sizeof(out_));
    if (rows_sent < rows) {
      parts[count++] = {const_cast<unsigned char*>(out_rows_) + rows_sent, rows - rows_sent};
    }
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    const ssize_t sent = sendmsg(socket_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno != EAGAIN && errno != EINTR) lose(LossReason::kSystem, errno);
      return;
    }
    sent_bytes_ += static_cast<std::size_t>(sent);
  }
}

// Reads once: the rest of the header, and of the rows behind it as many as have come.
bool Connection::receive() {
  iovec parts[2];
  std::size_t count = 0;
  std::size_t room = memory_.payload_bytes;
  if (header_bytes_ < sizeof(in_)) {
    parts[count++] = {reinterpret_cast<unsigned char*>(&in_) + header_bytes_,
                      sizeof(in_) - header_bytes_};
  } else {
    room = std::size_t{in_.rows} * in_.row_bytes - row_bytes_;
  }
  if (resumed_) parts[count++] = {incoming_payload() + row_bytes_, room};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = count;
  const ssize_t got = recvmsg(socket_, &message, MSG_DONTWAIT);
  if (got < 0) return errno == EAGAIN || errno == EINTR ? false : lose(LossReason::kSystem, errno);
  if (got == 0) return lose(LossReason::kClosed);
  const std::size_t bytes = static_cast<std::size_t>(got);
  const std::size_t of_header = std::min(bytes, sizeof(in_) - header_bytes_);
  const bool had_header = header_bytes_ == sizeof(in_);
  header_bytes_ += of_header;
  row_bytes_ += bytes - of_header;
  if (header_bytes_ < sizeof(in_)) return false;
  if (!had_header && !begin_message()) return false;
  if (row_bytes_ < std::size_t{in_.rows} * in_.row_bytes) return false;
  header_bytes_ = row_bytes_ = 0;
  return take_message();
}

// While it is not the peer's turn, only its end may be seen.
bool Connection::receive_nothing() {
  unsigned char byte;
  const ssize_t got = recv(socket_, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
  if (got > 0) return lose(LossReason::kUnasked);
  if (got == 0) return lose(LossReason::kClosed);
  return errno == EAGAIN || errno == EINTR ? false : lose(LossReason::kSystem, errno);
}

// Looks at a header that is whole now; returns whether its message may go on.
bool Connection::begin_message() {
  const bool here = end_ == LinkEnd::kAttention;
  const MessageKind due = !resumed_ ? MessageKind::kState
                          : here    ? MessageKind::kReply
                                    : MessageKind::kDispatch;
  if (in_.kind != due || in_.reserved != 0) return lose(LossReason::kMalformed);
  if (due != MessageKind::kDispatch && (in_.model != 0 || in_.layer != 0)) {
    return lose(LossReason::kMalformed);
  }
  const bool refused = in_.rows == 0 && in_.row_bytes == 0;
  if (due == MessageKind::kState) return refused || lose(LossReason::kMalformed);
  const Link& link = *memory_.link;
  if (due == MessageKind::kReply) {
    const bool own = number_of_dispatch() > adopted_;
    if (in_.sequence != number_of_dispatch()) return lose(LossReason::kNumber);
    if (own && in_.epoch != link.dispatch.epoch) return lose(LossReason::kNumber);
    const bool same = in_.rows == link.dispatch.rows && in_.row_bytes == link.dispatch.row_bytes;
    if (!refused && !(own ? same : memory_.fits(in_.rows, in_.row_bytes))) {
      return lose(LossReason::kRows);
    }
  } else {
    // New memory begins at 0, whatever number the first dispatch has.
    const std::uint64_t last = number_of_reply();
    if (in_.sequence != last + 1 && (last != 0 || in_.sequence == 0))
      return lose(LossReason::kNumber);
    if (in_.epoch == 0 || (epoch_ != 0 && in_.epoch != epoch_)) return lose(LossReason::kNumber);
    if (!memory_.fits(in_.rows, in_.row_bytes)) return lose(LossReason::kRows);
    epoch_ = in_.epoch;
  }
  // The peer may not send more before this end has replied.
  if (row_bytes_ > std::size_t{in_.rows} * in_.row_bytes) return lose(LossReason::kMalformed);
  return true;
}

// Publishes a message that is whole. Returns whether the peer's signal has changed.
bool Connection::take_message() {
  Link& link = *memory_.link;
  if (in_.kind == MessageKind::kState) {
    const std::uint64_t before = number_of_reply();
    const LossReason reason = end_ == LinkEnd::kAttention
                                  ? resume_attention(in_.sequence, in_.epoch)
                                  : resume_ffn(in_.sequence, in_.epoch);
    if (reason != LossReason::kNone) return lose(reason);
    resumed_ = true;
    open_.store(true, std::memory_order_relaxed);
    send();
    return number_of_reply() != before;
  }
  if (in_.kind == MessageKind::kReply) {
    link.combine = {in_.epoch, in_.rows, in_.row_bytes};
    link.combined.store(in_.sequence);
  } else {
    link.dispatch = {in_.epoch, in_.model, in_.layer, in_.rows, in_.row_bytes};
    if (number_of_reply() == 0) {  // the memory is new
      published_ = in_.sequence - 1;
      link.combined.store(published_);
    }
    link.dispatched.store(in_.sequence);
  }
  return true;
}

// Compares the numbers of an attention rank with those that its FFN rank has told.
LossReason Connection::resume_attention(std::uint64_t dispatched, std::uint64_t combined) {
  if (dispatched != combined && dispatched != combined + 1) return LossReason::kNumber;
  const std::uint64_t own = number_of_dispatch(), replied = number_of_reply();
  published_ = own;
  if (replied == kUnheard) {
    memory_.link->dispatched.store(dispatched);
    memory_.link->combined.store(combined);
    published_ = adopted_ = dispatched;
    return LossReason::kNone;
  }
  if (own == replied) {
    const bool fits = dispatched == 0 || (dispatched == own && combined == own);
    return fits ? LossReason::kNone : LossReason::kNumber;
  }
  if (dispatched == own) return LossReason::kNone;
  const bool lost = dispatched == 0 || (dispatched == replied && combined == replied);
  if (own > adopted_ && lost) {
    published_ = replied;  // the dispatch did not arrive, or went with the FFN rank
    return LossReason::kNone;
  }
  if (dispatched != 0) return LossReason::kNumber;
  // The dispatch of an earlier attention rank has gone with the FFN rank.
  memory_.link->combined.store(own);
  return LossReason::kNone;
}

// Compares the numbers of an FFN rank with those that the attention rank has told.
LossReason Connection::resume_ffn(std::uint64_t dispatched, std::uint64_t combined) {
  const std::uint64_t seen = number_of_dispatch(), replied = number_of_reply();
  published_ = replied;
  if (combined == kUnheard) {
    published_ = told_reply_;  // which it has taken; there may have been a reply since
    return dispatched == 0 ? LossReason::kNone : LossReason::kNumber;
  }
  if (dispatched != combined && dispatched != combined + 1) return LossReason::kNumber;
  if (seen == 0) return LossReason::kNone;
  if (dispatched == seen) {
    if (combined == replied) return LossReason::kNone;
    if (replied != seen) return LossReason::kNumber;
    published_ = replied - 1;  // the reply did not arrive
    return LossReason::kNone;
  }
  const bool lost = dispatched == seen + 1 && replied == seen && combined == replied;
  return lost ? LossReason::kNone : LossReason::kNumber;
}

// Ends the connection, and leaves the link's memory as it is. Returns false.
bool Connection::lose(LossReason reason, int error) {
  close(socket_);
  socket_ = -1;
  message_bytes_ = sent_bytes_ = 0;
  open_.store(false, std::memory_order_relaxed);
  reason_.store(reason, std::memory_order_relaxed);
  error_.store(error, std::memory_order_relaxed);
  losses_.fetch_add(1, std::memory_order_release);
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = write(lost_, &one, sizeof(one));
  return false;
}

}  // namespace crosspool
