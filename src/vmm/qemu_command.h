#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "vmm/vmm.h"

/* How QEMU is found and called. */

#define QEMU_COMMAND_MAX 64

/* A NULL-terminated list of strings, all owned. A zeroed one is empty. */
struct qemu_command {
    char *items[QEMU_COMMAND_MAX + 1];
    size_t count;
    int failed; /* 0, or the first error: checked once, at the end */
};

void qemu_command_free(struct qemu_command *command);
#define cleanup_qemu_command __attribute__((cleanup(qemu_command_free)))

/* The absolute path of QEMU: from PATH, or where distributions put it. -ENOENT: nowhere. The caller
 * frees it. */
int qemu_program_find(char **ret_path);

/* The arguments for one boot. `qmp_fd` is the number that the listening QMP socket has in QEMU,
 * `serial_log` an absolute path. */
int qemu_command_build(struct qemu_command *command, const struct vmm_config *config,
                       const char *program, bool kvm, int qmp_fd, const char *serial_log);

/* The environment: nothing of the daemon's. Temporary files go to `dir`. */
int qemu_command_build_env(struct qemu_command *env, const char *dir);
