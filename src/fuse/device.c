#include "fuse/device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "util/cleanup.h"

bool fuse_device_check(char **ret_found, char **ret_remedy) {
    cleanup_close int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (fd >= 0)
        return true;
    if (errno == ENOENT || errno == ENODEV || errno == ENXIO) {
        *ret_found = strdup("there is no /dev/fuse");
        *ret_remedy = strdup("load the kernel's module with modprobe fuse");
        return false;
    }
    if (asprintf(ret_found, "/dev/fuse cannot be opened: %s", strerror(errno)) < 0)
        *ret_found = NULL;
    *ret_remedy = strdup("let everybody, as Debian does, with chmod 666 /dev/fuse; a container has "
                         "to be given the device");
    return false;
}
