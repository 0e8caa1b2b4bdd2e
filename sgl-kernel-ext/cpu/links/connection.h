// A link whose ends are on two hosts. Each end has link memory of its own (lanes.h), and a TCP
// connection carries what an end publishes there into the memory of the other: rows are sent from
// where they were computed, and received where they will be read.
//
// On the wire a message is a MessageHeader and, of a dispatch or a reply, its rows. Each end first
// tells the numbers that its memory has (kState). From both, either end knows what was lost with an
// earlier connection or process, and sends it again: memory keeps a dispatch until its reply is
// there, and a reply until the next dispatch. An attention rank that is new takes the numbers of
// the FFN rank, and its link is free once the dispatch of its predecessor, if there is one, has its
// reply; an FFN rank that is new, with all numbers 0, gets the dispatch that waits for a reply
// again.
//
// Nothing is believed of a message before it was compared with the memory: its number, its epoch,
// and the rows that there is room for. Whatever does not fit ends the connection, which leaves the
// link as it was. So does an end that has died or cannot be reached: the link waits for the next
// connection, as a link in shared memory does for the next process.
#ifndef CROSSPOOL_CPU_LINKS_CONNECTION_H
#define CROSSPOOL_CPU_LINKS_CONNECTION_H

#include <crosspool/lanes.h>

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace crosspool {

// Whose end of a link it is.
enum class LinkEnd : std::int32_t { kAttention = 0, kFFN = 1 };

enum class MessageKind : std::uint32_t { kState = 1, kDispatch = 2, kReply = 3 };

struct MessageHeader {
  MessageKind kind;
  std::uint32_t model;     // of a dispatch; else 0
  std::uint64_t sequence;  // of the dispatch; kState: of the last dispatch
  std::uint64_t epoch;     // of the dispatch; kState: the number of the last reply, or kUnheard
  std::uint32_t layer;     // of a dispatch; else 0
  std::uint32_t rows;      // 0: the dispatch is refused
  std::uint32_t row_bytes;
  std::uint32_t reserved;  // 0
};

static_assert(sizeof(MessageHeader) == 40 && std::is_trivially_copyable_v<MessageHeader>);
static_assert(offsetof(MessageHeader, sequence) == 8 && offsetof(MessageHeader, layer) == 24);
static_assert(std::endian::native == std::endian::little, "the wire is little-endian");

// The number of the last reply in the memory of an attention rank that has not heard of its FFN
// rank yet. No dispatch has it, so that the link is not free.
inline constexpr std::uint64_t kUnheard = ~std::uint64_t{0};

// Why a connection has ended.
enum class LossReason : std::int32_t {
  kNone = 0,
  kClosed = 1,     // the peer closed it, or died
  kSystem = 2,     // an error of the system, which has a number
  kMalformed = 3,  // a message of no kind, or longer than its rows
  kUnasked = 4,    // a message that was not its sender's turn
  kNumber = 5,     // a number or an epoch that does not fit
  kRows = 6,       // rows that there is no room for, or other ones than those of the dispatch
};

// What a connection is and was, for any thread.
struct ConnectionStatus {
  std::uint64_t losses;  // connections that have ended
  std::int32_t open;     // whether both ends have told their numbers
  LossReason reason;     // of the last that ended
  std::int32_t error;    // errno of kSystem
  std::int32_t reserved;
};

class Connection {
 public:
  // The memory is all zero. `lost` (an eventfd) is written to whenever a connection has ended.
  Connection(LinkMemory memory, LinkEnd end, int lost);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Takes a connected socket, whose ends have proven to each other who they are; from any thread.
  // At the loop's next look it takes the place of the one before.
  void hand_over(int socket);

  // The functions below are for the loop's thread.

  // Sends what this end has published, as far as the system takes it.
  void publish();
  // Does so, and takes what has come. Returns whether the peer's signal has changed.
  bool progress();
  // Whether a message of the peer may come, or one of this end is under way.
  bool is_expecting() const { return socket_ >= 0 && (is_sending() || may_receive()); }
  bool is_sending() const { return sent_bytes_ < message_bytes_; }
  int socket() const { return socket_; }

  ConnectionStatus status() const;  // for any thread

  // The registration with Network's epoll, by the loop's thread; `armed` is also the waker's.
  bool registered = false;
  std::atomic<bool> armed{false};

 private:
  bool may_receive() const;
  void take_socket();
  bool next_message();
  void send();
  bool receive();
  bool receive_nothing();
  bool begin_message();
  bool take_message();
  LossReason resume_attention(std::uint64_t dispatched, std::uint64_t combined);
  LossReason resume_ffn(std::uint64_t dispatched, std::uint64_t combined);
  bool lose(LossReason reason, int error = 0);
  std::uint64_t number_of_dispatch() const { return memory_.link->dispatched.load(); }
  std::uint64_t number_of_reply() const { return memory_.link->combined.load(); }
  unsigned char* incoming_payload() const {
    return end_ == LinkEnd::kAttention ? memory_.combine_payload() : memory_.dispatch_payload();
  }

  LinkMemory memory_;
  LinkEnd end_;
  int lost_;
  int socket_ = -1;
  std::atomic<int> handed_{-1};

  // What this end sends. `published_`: its number up to which it has been sent, or begun.
  std::uint64_t published_ = 0;
  MessageHeader out_{};
  const unsigned char* out_rows_ = nullptr;
  std::size_t message_bytes_ = 0;
  std::size_t sent_bytes_ = 0;
  bool told_ = false;             // this end's numbers are sent, or under way
  std::uint64_t told_reply_ = 0;  // the second of them

  // What this end receives.
  MessageHeader in_{};
  std::size_t header_bytes_ = 0;
  std::size_t row_bytes_ = 0;  // of all rows, so far
  bool resumed_ = false;       // the peer's numbers are known
  std::uint64_t epoch_ = 0;    // of the dispatches on this connection; 0: none yet
  std::uint64_t adopted_ = 0;  // dispatches up to this number are of an earlier attention rank

  std::atomic<std::uint64_t> losses_{0};
  std::atomic<bool> open_{false};
  std::atomic<LossReason> reason_{LossReason::kNone};
  std::atomic<int> error_{0};
};

}  // namespace crosspool

#endif
