#include "vmm/host.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "util/cleanup.h"

char *host_join(const char *folder, const char *name) {
    cleanup_buf struct buf path = {0};
    buf_printf(&path, "%s/%s", folder, name);
    return buf_steal(&path, NULL);
}

/* Sets *ret_path to folder/name if that can be executed. */
static int program_try(const char *folder, size_t length, const char *name, char **ret_path) {
    cleanup_buf struct buf path = {0};
    /* Relative entries of PATH mean nothing to a daemon that runs in `/`. */
    if (!length || folder[0] != '/')
        return -ENOENT;
    buf_append(&path, folder, length);
    buf_printf(&path, "/%s", name);
    if (path.failed)
        return path.failed;
    if (access(path.data, X_OK) < 0)
        return -ENOENT;
    *ret_path = buf_steal(&path, NULL);
    return 0;
}

int host_find_program(const char *name, char **ret_path) {
    static const char *const others[] = {"/usr/bin", "/usr/local/bin",
                                         "/usr/libexec" /* Red Hat's qemu-kvm */};
    const char *entry = getenv("PATH");
    while (entry && *entry) {
        size_t length = strcspn(entry, ":");
        int status = program_try(entry, length, name, ret_path);
        if (status != -ENOENT)
            return status;
        entry += length + (entry[length] == ':');
    }
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        int status = program_try(others[i], strlen(others[i]), name, ret_path);
        if (status != -ENOENT)
            return status;
    }
    return -ENOENT;
}

/* Whether the first "flags" line of /proc/cpuinfo has vmx (Intel) or svm (AMD). */
static bool cpu_has_virtualization(void) {
    FILE *file = fopen("/proc/cpuinfo", "re");
    if (!file)
        return false;
    cleanup_free char *line = NULL;
    size_t size = 0;
    bool found = false;
    while (getline(&line, &size, file) >= 0) {
        if (strncmp(line, "flags", 5) != 0)
            continue;
        char *rest = NULL;
        for (char *flag = strtok_r(line, " \t\n", &rest); flag && !found;
             flag = strtok_r(NULL, " \t\n", &rest))
            found = strcmp(flag, "vmx") == 0 || strcmp(flag, "svm") == 0;
        break;
    }
    fclose(file);
    return found;
}

bool host_kvm_opens(void) {
    cleanup_close int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    return fd >= 0;
}

bool host_has_kvm(const char **ret_why) {
    const char *told = getenv("VMSFS_KVM");
    const char *why = NULL;
    if (told && strcmp(told, "yes") == 0)
        return true;
    if (told && strcmp(told, "no") == 0) {
        why = "VMSFS_KVM=no, unset it";
    } else if (!cpu_has_virtualization()) {
        /* The flag first: /dev/kvm has been seen to open, and then to boot no stock kernel. */
        why = "the CPU shows neither vmx nor svm";
    } else if (!host_kvm_opens()) {
        why = errno == EACCES   ? "/dev/kvm: permission denied, join the group kvm"
              : errno == ENOENT ? "there is no /dev/kvm, load the module kvm_intel or kvm_amd"
                                : "/dev/kvm cannot be opened";
    }
    if (why && ret_why)
        *ret_why = why;
    return !why;
}
