// A libcuda.so.1 that says what it was asked, for the test that the arguments of
// crosspool.kernels.cuda_driver arrive as cuda.h declares them. It manages no memory.
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SAID(...) (printf(__VA_ARGS__), fflush(stdout), answer(__func__))

// CUDA_ERROR_OUT_OF_MEMORY from the call that the environment names, else success.
static CUresult answer(const char* call) {
  const char* failing = getenv("LIBCUDA_FAILS");
  return failing && strcmp(failing, call) == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return SAID("init %u\n", flags); }

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = 40 + ordinal;
  return SAID("device %d\n", ordinal);
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = 1;
  return SAID("attribute %d of %d\n", attribute, device);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)0x7000;
  return SAID("retain %d\n", device);
}

CUresult cuCtxSetCurrent(CUcontext context) { return SAID("current %p\n", (void*)context); }

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  *free = 3ull << 33;
  *total = 5ull << 34;
  return SAID("info\n");
}

static void say_properties(const CUmemAllocationProp* p) {
  printf("properties %d %d %d %d; ", p->type, p->requestedHandleTypes, p->location.type,
         p->location.id);
}

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags option) {
  *granularity = 2 << 20;
  say_properties(properties);
  return SAID("granularity %d\n", option);
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
  *address = 0x7f1234000000ull;
  return SAID("reserve %zu %zu %llu %llu\n", size, alignment, hint, flags);
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  return SAID("free %#llx %zu\n", address, size);
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                     const CUmemAllocationProp* properties, unsigned long long flags) {
  *handle = 0xfedcba9876543210ull;
  say_properties(properties);
  return SAID("create %zu %llu\n", size, flags);
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  return SAID("release %#llx\n", handle);
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  return SAID("map %#llx %zu %zu %#llx %llu\n", address, size, offset, handle, flags);
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc* access,
                        size_t count) {
  // Work is queued for as many calls as the environment says.
  static int calls = 0;
  const char* queued = getenv("LIBCUDA_NOT_READY");
  const CUresult said = SAID("access %#llx %zu %zu: %d %d %d\n", address, size, count,
                             access->location.type, access->location.id, access->flags);
  return queued && calls++ < atoi(queued) ? CUDA_ERROR_NOT_READY : said;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  return SAID("unmap %#llx %zu\n", address, size);
}

CUresult cuMemExportToShareableHandle(void* descriptor, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  *(int*)descriptor = dup(1);
  return SAID("export %#llx %d %llu\n", handle, type, flags);
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* descriptor,
                                        CUmemAllocationHandleType type) {
  *handle = 0x5151;
  // A descriptor that is open can be duplicated.
  const int copy = dup((int)(long)descriptor);
  const int open = copy >= 0;
  if (open) close(copy);
  return SAID("import %s %d\n", open ? "open" : "closed", type);
}

#undef cuGetProcAddress
CUresult cuGetProcAddress_v2(const char* name, void** function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* status) {
  (void)version, (void)flags;
  char newer[256];
  snprintf(newer, sizeof newer, "%s_v2", name);
  *function = dlsym(RTLD_DEFAULT, newer);
  if (!*function) *function = dlsym(RTLD_DEFAULT, name);
  if (status) {
    *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetProcAddress(const char* name, void** function, int version, cuuint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
