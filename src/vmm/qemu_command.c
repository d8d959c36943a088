#include "vmm/qemu_command.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vmm/host.h"

#define QEMU_PROGRAM "qemu-system-x86_64"

/* The one place for the machine that guests see. */
#define QEMU_MACHINE "q35,i8042=off"

/* Emulation: `max` has what today's distributions ask for (x86-64-v3, rdrand), qemu64 has not.
 * A translation cache of 32 MiB (QEMU's own choice is up to 1 GiB) costs nothing at boot. */
#define QEMU_ACCEL_TCG "tcg,tb-size=32"
#define QEMU_CPU_TCG "qemu64,+rdrand"

void qemu_command_free(struct qemu_command *c) {
    for (size_t i = 0; i < c->count; i++)
        free(c->items[i]);
    *c = (struct qemu_command){0};
}

/* Takes over `item`. */
static void command_add_owned(struct qemu_command *c, char *item) {
    if (!item)
        c->failed = -ENOMEM;
    if (!c->failed && c->count == QEMU_COMMAND_MAX)
        c->failed = -E2BIG;
    if (c->failed)
        free(item);
    else
        c->items[c->count++] = item;
}

static void __attribute__((format(printf, 2, 3)))
command_add(struct qemu_command *c, const char *format, ...) {
    cleanup_buf struct buf text = {0};
    va_list args;
    va_start(args, format);
    buf_vprintf(&text, format, args);
    va_end(args);
    command_add_owned(c, buf_steal(&text, NULL));
}

/* An option and its value as they are. */
static void command_add_option(struct qemu_command *c, const char *name, const char *value) {
    command_add(c, "%s", name);
    command_add(c, "%s", value);
}

void qemu_command_print_path(struct buf *out, const char *prefix, const char *path,
                             const char *suffix) {
    buf_append_str(out, prefix);
    for (; *path; path++) {
        buf_append_char(out, *path);
        if (*path == ',')
            buf_append_char(out, ',');
    }
    buf_append_str(out, suffix);
}

static void command_add_path(struct qemu_command *c, const char *prefix, const char *path,
                             const char *suffix) {
    cleanup_buf struct buf text = {0};
    qemu_command_print_path(&text, prefix, path, suffix);
    command_add_owned(c, buf_steal(&text, NULL));
}

int qemu_program_find(char **ret_path) {
    int status = host_find_program(QEMU_PROGRAM, ret_path);
    return status == -ENOENT ? host_find_program("qemu-kvm", ret_path) : status; /* Red Hat */
}

/* Whether `-cpu help`, "x86 NAME …" or "  NAME …" a line, has this name. */
static bool qemu_help_has_cpu(const char *help, const char *name, size_t length) {
    for (const char *line = help; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        const char *word = line;
        if (strncmp(word, "x86 ", 4) == 0)
            word += 4;
        word += strspn(word, " ");
        if (strncmp(word, name, length) == 0 && strchr(" \r\n", word[length]))
            return true;
    }
    return false;
}

bool qemu_has_cpu(const char *model) {
    cleanup_free char *program = NULL;
    cleanup_buf struct buf help = {0};
    if (qemu_program_find(&program) < 0)
        return true; /* which is another matter */
    char *argv[] = {program, (char[]){"-cpu"}, (char[]){"help"}, NULL};
    if (process_run(program, argv, 5000, &help) != 0 || !help.len ||
        !qemu_help_has_cpu(help.data, "max", 3))
        return true; /* it does not say so, or not in these words */
    return qemu_help_has_cpu(help.data, model, strcspn(model, ","));
}

/* The template writes to the file of its memory; who starts from it copies the pages that he
 * writes, and shares the others with everybody. */
static void command_add_memory(struct qemu_command *c, const struct vmm_config *config) {
    cleanup_buf struct buf prefix = {0};
    buf_printf(&prefix, "memory-backend-file,id=ram0,size=%uM,share=%s,mem-path=", config->memory,
               config->identity ? "off" : "on");
    command_add(c, "-object");
    command_add_path(c, prefix.failed ? "" : prefix.data, config->ram, "");
    command_add_option(c, "-machine", QEMU_MACHINE ",memory-backend=ram0");
}

/* The port through which the guest reads who it is. In the template nothing ever comes; afterwards
 * it is a file, which QEMU's `pipe` takes as well, and what the guest writes goes nowhere. */
static void command_add_port(struct qemu_command *c, const struct vmm_config *config) {
    command_add(c, "-chardev");
    if (config->identity)
        command_add_path(c, "pipe,id=port0,path=", config->identity, QEMU_PORT_SUFFIX);
    else
        command_add(c, "ringbuf,id=port0,size=64");
    command_add_option(c, "-device", "virtio-serial-pci,max_ports=2");
    command_add_option(c, "-device",
                       "virtserialport,id=" QEMU_PORT ",chardev=port0,name=vmsfs." QEMU_PORT);
}

json_t *qemu_template_capabilities(void) {
    return json_pack("{s:[{s:s, s:b}]}", "capabilities", "capability", "x-ignore-shared", "state",
                     1);
}

int qemu_listen(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        log_error("%s: the path of a socket has 107 bytes at most, this has %zu", path,
                  strlen(path));
        return -ERR_NAME_TOO_LONG;
    }
    memcpy(address.sun_path, path, strlen(path));
    cleanup_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    /* What an earlier boot left. Linux creates the file with the mode of the socket's inode
     * (unix_bind), so there is no moment with a wider one, and no umask that other threads would
     * get too. */
    unlink(path);
    if (fchmod(fd, 0600) < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(fd, 1) < 0)
        return -errno;
    int ret = fd;
    fd = -1;
    return ret;
}

int qemu_command_build(struct qemu_command *c, const struct vmm_config *config, const char *program,
                       bool kvm, int qmp_fd, const char *serial_log) {
    command_add(c, "%s", program);
    /* The kernel's name of the process: `pkill qemu` finds it, and `pkill vmsfs` does not. */
    command_add(c, "-name");
    command_add(c, "guest=%s,process=qemu-%s", config->id, config->id);
    command_add(c, "-nodefaults");
    command_add(c, "-no-user-config");
    command_add(c, "-no-reboot");
    command_add_option(c, "-display", "none");
    command_add_option(c, "-sandbox",
                       "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");

    if (config->ram)
        command_add_memory(c, config);
    else
        command_add_option(c, "-machine", QEMU_MACHINE);
    command_add_option(c, "-accel", kvm ? "kvm" : QEMU_ACCEL_TCG);
    const char *cpu = config->cpu_model && config->cpu_model[0] ? config->cpu_model : NULL;
    command_add_option(c, "-cpu", cpu ? cpu : kvm ? "host" : QEMU_CPU_TCG);
    command_add(c, "-m");
    command_add(c, "%uM", config->memory);
    command_add(c, "-smp");
    command_add(c, "%u", config->vcpus);

    /* These three are plain strings to QEMU, with nothing to quote. What starts from a template has
     * its kernel in memory. */
    if (!config->identity) {
        command_add_option(c, "-kernel", config->kernel);
        if (config->initrd)
            command_add_option(c, "-initrd", config->initrd);
        if (config->boot_args)
            command_add_option(c, "-append", config->boot_args);
    } else {
        command_add_option(c, "-incoming", "defer");
    }

    /* libslirp picks a free port of the host; `info usernet` tells which. */
    bool template = config->ram && !config->identity;
    command_add_option(c, "-netdev",
                       template ? "user,id=net0" : "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22");
    command_add_option(c, "-device", "virtio-net-pci,netdev=net0,romfile=");
    command_add_option(c, "-device", "virtio-rng-pci");

    if (config->ram)
        command_add_port(c, config);

    /* Where the host has no room, the guest is told so, as by a disk that fails: QEMU's own choice
     * is to pause it. */
    if (config->disk) {
        command_add(c, "-blockdev");
        command_add_path(c,
                         "driver=raw,node-name=disk0,discard=unmap,file.driver=file,"
                         "file.discard=unmap,file.filename=",
                         config->disk, "");
        command_add_option(c, "-device", "virtio-blk-pci,drive=disk0,werror=report,rerror=report");
    }

    /* append=on: whoever truncates a log that has grown too long gets no hole of NULs before it. */
    command_add(c, "-chardev");
    command_add_path(c, "file,id=serial0,path=", serial_log, ",append=on");
    command_add_option(c, "-serial", "chardev:serial0");

    command_add(c, "-chardev");
    command_add(c, "socket,id=qmp,fd=%d,server=on,wait=off", qmp_fd);
    command_add_option(c, "-mon", "chardev=qmp,mode=control");
    return c->failed;
}

int qemu_command_build_env(struct qemu_command *env, const char *dir) {
    command_add(env, "PATH=/usr/sbin:/usr/bin:/sbin:/bin");
    command_add(env, "LC_ALL=C");
    command_add(env, "HOME=%s", dir);
    command_add(env, "TMPDIR=%s", dir);
    return env->failed;
}
