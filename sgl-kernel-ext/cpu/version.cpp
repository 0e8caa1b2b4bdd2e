#include <crosspool/export.h>

#include <cstdint>

std::uint32_t crosspool_abi_version() { return CROSSPOOL_ABI_VERSION; }
