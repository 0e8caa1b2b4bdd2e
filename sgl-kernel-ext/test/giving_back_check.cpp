// Memory goes back in pieces that cover it, with a rest after each, and not beyond an error.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../cpu/engine/giving_back.h"
#include "check.h"

namespace {

using crosspool::kGiveBackBytes;

void check(std::uint64_t bytes, std::size_t fails_at) {
  std::vector<std::byte> memory(1);  // an address; nothing is touched
  std::byte* const begin = memory.data();
  std::uint64_t at = 0;
  std::size_t pieces = 0, rests = 0;
  const int found = crosspool::give_back_in_pieces(
      begin, bytes,
      [&](std::byte* piece, std::uint64_t size) {
        if (piece != begin + at) fail("giving_back_check: a piece begins elsewhere");
        if (size == 0 || size > kGiveBackBytes) fail("giving_back_check: a piece is too large");
        if (rests != pieces) fail("giving_back_check: no rest before piece %zu", pieces);
        at += size;
        return pieces++ == fails_at ? -12 : 0;
      },
      [&] { ++rests; });
  const std::size_t whole = (bytes + kGiveBackBytes - 1) / kGiveBackBytes;
  if (fails_at < whole) {
    if (found != -12 || pieces != fails_at + 1) fail("giving_back_check: an error is lost");
  } else if (found != 0 || at != bytes || pieces != whole || rests != whole) {
    fail("giving_back_check: %zu pieces and %zu rests instead of %zu", pieces, rests, whole);
  }
}

}  // namespace

int main() {
  for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{4096}, kGiveBackBytes,
                                    kGiveBackBytes + 4096, 500 * kGiveBackBytes}) {
    for (const std::size_t fails_at : {std::size_t{0}, std::size_t{1}, std::size_t{1000}}) {
      check(bytes, fails_at);
    }
  }
  std::puts("giving_back_check: fine");
  return 0;
}
