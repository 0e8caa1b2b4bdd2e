// The product x W^T over a range of panels and any number of rows. It prepares the rows, walks
// groups of panels and stretches of rows, prefetches the weights, and hands every tile to the
// caller.
#ifndef CROSSPOOL_CPU_KERNELS_PRODUCT_H
#define CROSSPOOL_CPU_KERNELS_PRODUCT_H

#include "advance.h"
#include "integers.h"
#include "multiply.h"

namespace crosspool::CROSSPOOL_ISA {

// Bytes of the rows that are worked on at a time, and of the scratch to copy them to; at least
// those of one stretch.
inline constexpr std::int64_t kOperandScratch = std::int64_t{256} << 10;
inline constexpr std::int64_t kFewestOperandRows = 32;

CROSSPOOL_INLINE std::int64_t operand_scratch(std::int64_t k) {
  return max(kOperandScratch, kFewestOperandRows * round_up(k, kDepth) * 4);
}

// Bytes behind the rows, for the plain form of a group of panels. There is room for the sums of few
// rows over groups, too.
CROSSPOOL_INLINE std::int64_t product_scratch(std::int64_t k) {
  return operand_scratch(k) + kGroup * round_up(k, kDepth) * kPanel * 4;
}

// Rows that are worked on while a weight is read once: as many as stay in the second-level cache
// beside two groups of panels, in blocks of near the same size.
CROSSPOOL_INLINE std::int64_t rows_at_once(std::int64_t rows, std::int64_t row_bytes) {
  const std::int64_t most = max(kFewestOperandRows, kOperandScratch / row_bytes);
  const std::int64_t blocks = max(1, (rows + most - 1) / most);
  return (rows + blocks - 1) / blocks;
}

template <class T>
CROSSPOOL_INLINE bool needs_copy(const Rows& x, std::int64_t rows, std::int64_t k) {
  if constexpr (!kReadsModelDType<T>) return true;
  if (uses_tiles<T>(rows)) return x.index != nullptr || k % kDepth != 0;
  return T::kDType == DType::kBFloat16 && k % 2 != 0;
}

// Copies a row of k elements as the micro-kernels read it, with zeros up to a multiple of kDepth.
template <class T>
CROSSPOOL_INLINE void copy_row(const typename T::Element* x, std::int64_t k, std::byte* out) {
  const std::int64_t depth = round_up(k, kDepth);
  if constexpr (kReadsModelDType<T>) {
    std::memcpy(out, x, k * sizeof(*x));
    std::memset(out + k * sizeof(*x), 0, (depth - k) * sizeof(*x));
  } else {
    auto* floats = reinterpret_cast<float*>(out);
    for_lanes(0, k, [&](std::int64_t i, auto n) { store(floats + i, T::load(x + i, n), n); });
    std::memset(floats + k, 0, (depth - k) * sizeof(float));
  }
}

// Rows [first, first + rows) of x for the micro-kernels, in place or copied to scratch.
template <class T>
CROSSPOOL_INLINE Operand ready_rows(const Rows& x, std::int64_t first, std::int64_t rows,
                                    std::int64_t k, bool copy, void* scratch) {
  using Element = typename T::Element;
  const auto* data = static_cast<const Element*>(x.data);
  const std::int32_t* const index = x.index == nullptr ? nullptr : x.index + first;
  if (!copy) {
    if (index == nullptr) data += first * x.stride;
    return {reinterpret_cast<const std::byte*>(data),
            static_cast<std::int64_t>(x.stride * sizeof(Element)), index};
  }
  auto* const out = static_cast<std::byte*>(scratch);
  const std::int64_t stride = round_up(k, kDepth) * kOperandBytes<T>;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t row = index == nullptr ? first + i : index[i];
    copy_row<T>(data + row * x.stride, k, out + i * stride);
  }
  return {out, stride, nullptr};
}

// What stretch `i` of `count` prefetches while it multiplies the group of panels at `group` (of
// `steps` lines each), which the group at `next` follows. The first of few stretches is bound by
// memory: it prefetches a little ahead in every panel, and the next group at the panels' ends. The
// later stretches find the weights in the cache and prefetch the next group, evenly; of many
// stretches only the last ones do. All stretches do so where the group was expanded.
CROSSPOOL_INLINE Prefetch ahead(const std::byte* group, const std::byte* next, bool first_group,
                                bool expanded, std::int64_t i, std::int64_t count,
                                std::int64_t steps, std::int64_t panel_bytes, int panels) {
  constexpr std::int64_t kFew = 3;
  const std::int64_t lines_ahead = 80 / panels;
  if (i == 0 && !expanded && (first_group || count <= kFew)) {
    const std::int64_t split = max(0, steps - lines_ahead);
    return {group + lines_ahead * 64, next - split * 64, split, 64, panel_bytes};
  }
  const std::int64_t sharing = count <= kFew ? max(1, count - 1) : count >= 8 ? 8 : 4;
  const std::int64_t turn = i - (count - sharing);
  if (turn < 0) return {group, nullptr, steps, 0, panel_bytes};
  return {next + turn * (panel_bytes / sharing), nullptr, steps, 64 / sharing, panel_bytes};
}

// Adds the products of the exceptions of `panels` compact panels, which lie panel_bytes apart, to
// the rows of a tile.
template <class T>
CROSSPOOL_INLINE void add_exceptions(const std::byte* group, std::int64_t panel_bytes, int panels,
                                     const Operand& x, std::int64_t first, std::int64_t rows,
                                     float* tile) {
  if constexpr (kHasCompact<T>) {
    for (int p = 0; p < panels; ++p) {
      const auto& header = *reinterpret_cast<const CompactHeader*>(group + p * panel_bytes);
      for (std::int32_t e = 0; e < header.count; ++e) {
        const Exception& exception = header.exceptions()[e];
        const float weight = widened(exception.value);
        for (std::int64_t i = 0; i < rows; ++i) {
          std::uint16_t element;
          std::memcpy(&element, x.row(first + i) + std::int64_t{exception.depth} * 2, 2);
          tile[i * kTileWidth + p * kPanel + exception.column] += weight * widened(element);
        }
      }
    }
  }
}

// The product of few rows with a grouped matrix, whose weights are decoded for each stretch of
// them.
template <class T, class Done>
CROSSPOOL_INLINE void grouped_product(const Matrix& weight, const Rows& x, std::int64_t rows,
                                      int begin, int end, const void* then, void* scratch,
                                      Done done) {
  const std::int64_t k = weight.k, panel_bytes = weight.panel_bytes();
  const bool scaled = kRowScale != 1.0F && weight.codes == Codes::kE4M3;
  const bool copy = scaled || needs_copy<T>(x, 1, k) || k % weight.code_depths() != 0;
  auto* const sums =
      reinterpret_cast<float*>(static_cast<std::byte*>(scratch) + operand_scratch(k));
  alignas(64) Tile tile;
  for (std::int64_t row = 0; row < rows; row += kMostGroupedRows) {
    const std::int64_t count = min(kMostGroupedRows, rows - row);
    const Operand operand = ready_rows<T>(x, row, count, k, copy, scratch);
    for (std::int64_t i = 0; weight.offset != Offset::kNone && i < count; ++i) {
      sum_groups<T>(operand.row(i), weight, sums + i * weight.groups());
    }
    if (scaled) {
      auto* const floats = static_cast<float*>(scratch);
      for_lanes(0, count * round_up(k, kDepth), [&](std::int64_t at, auto) {
        store(floats + at, load(floats + at) * splat(kRowScale));
      });
    }
    for (int panel = begin; panel < end; panel += kGroup) {
      const int panels = static_cast<int>(min(kGroup, end - panel));
      advance();
      const auto* const data = static_cast<const std::byte*>(weight.data) + panel * panel_bytes;
      const auto* next =
          panel + panels < end ? data + panels * panel_bytes : static_cast<const std::byte*>(then);
      if (next == nullptr) next = data;
      multiply_grouped<T>({&weight, data, panels, next, operand, 0, count, sums}, tile.at);
      done(row, count, panel, panels, tile.at);
    }
  }
}

// The product of any number of rows with a grouped matrix of integers.
template <class Done>
CROSSPOOL_INLINE void integer_product(const Matrix& weight, const Rows& x, std::int64_t rows,
                                      int begin, int end, const void* then, void* scratch,
                                      Done done) {
  const std::int64_t panel_bytes = weight.panel_bytes();
  const auto* const data = static_cast<const std::byte*>(weight.data);
  const std::int64_t row_bytes = IntegerRows::row_bytes(weight);
  const std::int64_t at_once = rows_at_once(rows, row_bytes);
  alignas(64) Tile tile;
  for (std::int64_t row = 0; row < rows; row += at_once) {
    const std::int64_t block = min(at_once, rows - row);
    const std::int64_t stretches = (block + kMostIntegerRows - 1) / kMostIntegerRows;
    const auto stretch = [&](std::int64_t i) { return block * i / stretches; };
    const auto integers = [&](std::int64_t i) {
      return IntegerRows(weight, static_cast<std::byte*>(scratch) + stretch(i) * row_bytes,
                         stretch(i + 1) - stretch(i));
    };
    for (std::int64_t i = 0; i < stretches; ++i) {
      const IntegerRows of_stretch = integers(i);
      for (std::int64_t j = 0; j < of_stretch.rows; ++j) {
        const std::int64_t at = row + stretch(i) + j, from = x.index == nullptr ? at : x.index[at];
        make_integers(weight, static_cast<const std::uint16_t*>(x.data) + from * x.stride,
                      of_stretch, j);
      }
    }
    for (int panel = begin; panel < end; panel += kGroup) {
      const int panels = static_cast<int>(min(kGroup, end - panel));
      const std::byte* const group = data + panel * panel_bytes;
      const auto* next =
          panel + panels < end ? group + panels * panel_bytes : static_cast<const std::byte*>(then);
      if (next == nullptr) next = group;
      advance();
      for (std::int64_t i = 0; i < stretches; ++i) {
        const IntegerRows of_stretch = integers(i);
        multiply_integers({&weight, group, panels, next, of_stretch}, tile.at);
        done(row + stretch(i), of_stretch.rows, panel, panels, tile.at);
      }
    }
  }
}

// Calls done(row, rows, panel, panels, c) for tiles that cover rows [0, rows) and panels
// [begin, end): element (row + i, panel * 16 + j) is c[i * kTileWidth + j]. A tile never begins or
// ends inside a pair of panels that begins at an even distance from `begin`. `then`: weights that
// the caller reads next, or null.
template <class T, class Done>
CROSSPOOL_INLINE void product(const Matrix& weight, const Rows& x, std::int64_t rows, int begin,
                              int end, const void* then, void* scratch, Done done) {
  const bool grouped = weight.encoding == Encoding::kGrouped;
  if constexpr (kHasIntegers) {
    if (grouped && multiplies_integers<T>(weight)) {
      return integer_product(weight, x, rows, begin, end, then, scratch, done);
    }
  }
  if (grouped && rows <= kFewGroupedRows) {
    return grouped_product<T>(weight, x, rows, begin, end, then, scratch, done);
  }
  const std::int64_t k = weight.k, panel_bytes = weight.panel_bytes();
  const auto* const data = static_cast<const std::byte*>(weight.data);
  const bool copy = needs_copy<T>(x, rows, k);
  const bool compact = kHasCompact<T> && weight.encoding == Encoding::kCompact;
  const std::int64_t row_bytes = round_up(k, kDepth) * kOperandBytes<T>;
  const std::int64_t at_once = rows_at_once(rows, row_bytes);
  const std::int64_t plain_steps = T::kDType == DType::kBFloat16 ? (k + 1) / 2 : k;
  std::byte* const plain = static_cast<std::byte*>(scratch) + operand_scratch(k);
  alignas(64) Tile tile;
  for (std::int64_t row = 0; row < rows; row += at_once) {
    const std::int64_t block = min(at_once, rows - row);
    const Operand operand = ready_rows<T>(x, row, block, k, copy, scratch);
    const MultiplyScope<T> scope(block);
    const bool expanded = grouped || (compact && !scope.reads_compact());
    const std::int64_t steps = compact && !expanded ? panel_bytes / 64 : plain_steps;
    for (int panel = begin, panels; panel < end; panel += panels) {
      panels = scope.panels(end - panel);
      const std::byte* const group = data + panel * panel_bytes;
      const std::byte* next = group + panels * panel_bytes;
      if (panel + panels == end) {
        next = row + at_once < rows ? data + begin * panel_bytes
               : then == nullptr    ? group
                                    : static_cast<const std::byte*>(then);
      }
      advance();
      for (int p = 0; expanded && p < panels; ++p) {
        std::byte* const to = plain + p * weight.plain_panel_bytes();
        if (grouped) {
          expand_grouped<T>(weight, group + p * panel_bytes, to);
        } else {
          expand(group + p * panel_bytes, weight.header_bytes(), weight.depth(), to);
        }
      }
      for (std::int64_t i = 0; i < scope.stretches(); ++i) {
        const std::int64_t first = scope.begin(i), count = scope.begin(i + 1) - first;
        const Prefetch prefetch = ahead(group, next, panel == begin, expanded, i, scope.stretches(),
                                        steps, panel_bytes, panels);
        const Multiply m{operand,
                         expanded ? plain : group,
                         expanded ? weight.plain_panel_bytes() : panel_bytes,
                         k,
                         prefetch,
                         first,
                         count,
                         panels,
                         compact && !expanded ? weight.header_bytes() : 0};
        float* const c = scope.multiply(m, tile);
        if (compact) add_exceptions<T>(group, panel_bytes, panels, operand, first, count, c);
        done(row + first, count, panel, panels, c);
      }
    }
  }
}

}  // namespace crosspool::CROSSPOOL_ISA

#endif
