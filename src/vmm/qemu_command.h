#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "util/buf.h"
#include "vmm/process.h"
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

/* Does QEMU know the CPU of this `-cpu`? Features behind commas are looked at when it starts. True
 * also when it cannot be asked. Blocks shortly. */
bool qemu_has_cpu(const char *model);

/* The arguments for one boot. `qmp_fd` is the number that the listening QMP socket has in QEMU,
 * `serial_log` an absolute path. */
int qemu_command_build(struct qemu_command *command, const struct vmm_config *config,
                       const char *program, bool kvm, int qmp_fd, const char *serial_log);

/* The descriptor of the device state, in a QEMU that starts from a template. */
#define QEMU_STATE_FD (PROCESS_FD + 1)

/* What QMP's migrate-set-capabilities takes: memory that is a file of its own is not in the device
 * state. NULL: no memory. */
json_t *qemu_template_capabilities(void);

/* QEMU's name for the port through which a guest is told who it is. */
#define QEMU_PORT "identity"

/* Beside the file of the identity: links to it and to nowhere, with `.in` and `.out` behind, as
 * QEMU wants it. */
#define QEMU_PORT_SUFFIX ".port"

/* A listening QMP socket at `path`. Returns the descriptor or -errno. */
int qemu_listen(const char *path);

extern const struct vmm_template_ops qemu_template_ops;

/* The environment: nothing of the daemon's. Temporary files go to `dir`. */
int qemu_command_build_env(struct qemu_command *env, const char *dir);

/* Appends `prefix` + path + `suffix` as it stands in an option's list of key=value, where a comma
 * in a value is doubled. */
void qemu_command_print_path(struct buf *out, const char *prefix, const char *path,
                             const char *suffix);
