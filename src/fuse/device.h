#pragma once

#include <stdbool.h>

/* Can /dev/fuse be opened, which libfuse, or fusermount3 with the rights of its caller, will do? If
 * not, *ret_found says what is wrong and *ret_remedy what to do; the caller frees both. */
bool fuse_device_check(char **ret_found, char **ret_remedy);
