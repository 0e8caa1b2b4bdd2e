// The end of a native test that fails: a message, and exit status 1.
#ifndef CROSSPOOL_TEST_CHECK_H
#define CROSSPOOL_TEST_CHECK_H

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

[[noreturn]] inline void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::_Exit(1);
}

#endif
