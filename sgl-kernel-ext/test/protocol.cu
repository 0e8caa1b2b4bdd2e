// The protocol headers in device code: an attention rank's end, an FFN rank's end and the command
// ring, each used by a kernel. That it compiles for a device is the test.
#include <crosspool/command_ring.h>
#include <crosspool/lanes.h>

__global__ void attention_rank(crosspool::LinkMemory memory, crosspool::CommandRing* commands,
                               crosspool::EventRing* events) {
  crosspool::AttentionEnd end(memory);
  crosspool::Command command{};
  while (command.kind != crosspool::CommandKind::kStop) {
    if (!commands->pop(&command) || !end.free()) continue;
    end.payload()[0] = 1;
    end.dispatch({0, 0, 0, 1, 1});
    while (!end.replied()) {
    }
    if (end.combine() == nullptr) break;
    events->push({crosspool::EventKind::kDone, command.lane, command.step, 0, 0, 0});
  }
}

__global__ void ffn_rank(crosspool::LinkMemory memory, crosspool::Poll* ended) {
  crosspool::FFNEnd end(memory);
  for (;;) {
    const crosspool::Poll found = end.poll();
    if (found == crosspool::Poll::kNothing) continue;
    if (found == crosspool::Poll::kBroken) break;
    end.partial_sum()[0] = end.payload()[0];
    end.reply();
  }
  *ended = crosspool::Poll::kBroken;
}
