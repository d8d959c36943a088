/* Firecracker as a backend: https://firecracker-microvm.github.io. What it is told is a request for
 * each part of the machine, and one that boots it. It has no call that ends it: a guest that resets
 * ends it, and Ctrl-Alt-Del asks the guest to.
 *
 * With `config/jail_user` it is started by its jailer, by root: as that user, in a folder of the VM
 * from which it sees nothing else, with the files of the boot linked or copied into it. */
#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "vmm/host.h"
#include "vmm/process.h"
#include "vmm/rest.h"

#define FC_PROGRAM "firecracker"
#define FC_TITLE "Firecracker"
#define FC_JAILER "jailer"
#define FC_LOG "firecracker.log"
#define FC_VCPUS_MOST 32 /* vcpu_count in its specification */
#define FC_CID 3         /* the least that is free; each VMM has its own numbers */

/* A reset is the only way in which a guest can end Firecracker, and the keyboard controller is what
 * resets; the rest spares the kernel from looking for what that controller has not. In front:
 * behind a
 * "--" of the user's it would be init's. */
#define FC_BOOT_ARGS "reboot=k i8042.noaux i8042.nomux i8042.dumbkbd"

/* Names in the jail. */
#define FC_JAIL "jail"
#define FC_JAILED_SOCKET "/api.sock"
#define FC_JAILED_VSOCK "/vsock.sock"

static bool fc_is_jailed(const struct vmm_config *config) {
    return config->jail_user && config->jail_user[0];
}

/* The instance's id, by which a process without a daemon is known again: FNV-1a of the folder. In a
 * jail it is all that its command line says of the VM. */
static void fc_print_id(const char *dir, char *id, size_t size) {
    uint64_t hash = 0xcbf29ce484222325;
    for (const char *c = dir; *c; c++)
        hash = (hash ^ (unsigned char)*c) * 0x100000001b3;
    snprintf(id, size, "vmsfs-%016llx", (unsigned long long)hash);
}

static int fc_find_program(char **ret_path) {
    return host_find_program(FC_PROGRAM, ret_path);
}

/* What is `/` in the jail; the jailer decides on it. It has the name of the program's file, where
 * links to it lead: that of the releases has its version in its name. */
static char *fc_jail_root(const char *dir) {
    cleanup_free char *program = NULL, *file = NULL;
    char id[32], *root = NULL;
    if (fc_find_program(&program) == 0)
        file = realpath(program, NULL);
    const char *slash = file ? strrchr(file, '/') : NULL;
    fc_print_id(dir, id, sizeof id);
    return asprintf(&root, "%s/" FC_JAIL "/%s/%s/root", dir, slash ? &slash[1] : FC_PROGRAM, id) < 0
               ? NULL
               : root;
}

static const char *fc_kernel(const struct vmm_config *config) {
    return config->kernel_elf ? config->kernel_elf : config->kernel;
}

/* ---- the jail ---- */

static int fc_copy(const char *from, const char *to) {
    cleanup_close int in = open(from, O_RDONLY | O_CLOEXEC);
    cleanup_close int out = open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (in < 0 || out < 0)
        return -errno;
    char block[65536];
    ssize_t n;
    while ((n = read(in, block, sizeof block)) > 0)
        if (write(out, block, (size_t)n) != n)
            return errno ? -errno : -ENOSPC;
    return n < 0 ? -errno : 0;
}

/* Puts a file into the jail. What is the VM's own is linked and given to the user; the kernel,
 * which others use too, is copied. */
static int fc_bring(const char *root, const char *name, const char *from, bool own,
                    const struct passwd *user) {
    cleanup_free char *to = host_join(root, name);
    if (!from)
        return 0;
    if (!to)
        return -ENOMEM;
    int status = own ? (link(from, to) < 0 ? -errno : 0) : fc_copy(from, to);
    if (status == 0 && lchown(to, user->pw_uid, user->pw_gid) < 0)
        status = -errno;
    return status;
}

static int fc_fill_jail(const struct vmm_config *config, const char *root,
                        const struct passwd *user) {
    cleanup_free char *base = host_join(config->dir, FC_JAIL);
    cleanup_free char *log = host_join(config->dir, FC_LOG);
    if (!base || !log)
        return -ENOMEM;
    fs_remove_all(base); /* of the boot before: the jailer makes no device twice */
    int status = fs_mkdir_all(root, 0700);
    if (status == 0)
        status = fc_bring(root, "kernel", fc_kernel(config), false, user);
    if (status == 0)
        status = fc_bring(root, "initrd", config->initrd, true, user);
    if (status == 0)
        status = fc_bring(root, "disk", config->disk, true, user);
    if (status == 0)
        status = fs_replace_fast(log, 0600, "", 0);
    if (status == 0)
        status = fc_bring(root, FC_LOG, log, true, user);
    if (status == 0 && lchown(root, user->pw_uid, user->pw_gid) < 0)
        status = -errno;
    return status;
}

/* The user of the jail; `strings` is where the entry's are. NULL: there is none of this name. */
#define FC_USER_STRINGS 4096
static struct passwd *fc_find_user(const struct vmm_config *config, struct passwd *entry,
                                   char strings[FC_USER_STRINGS]) {
    struct passwd *user = NULL;
    return getpwnam_r(config->jail_user, entry, strings, FC_USER_STRINGS, &user) == 0 ? user : NULL;
}

static void fc_add_misfits_of_jail(const struct vmm_config *config, struct buf *out) {
    cleanup_free char *jailer = NULL;
    struct passwd entry;
    char strings[FC_USER_STRINGS];
    if (geteuid() != 0)
        vmm_add_misfit(out, "config/jail_user is set, and only root can jail it (empty it)");
    else if (host_find_program(FC_JAILER, &jailer) < 0)
        vmm_add_misfit(out, "config/jail_user is set, and there is no " FC_JAILER
                            " in PATH (it comes with Firecracker's releases)");
    else if (!fc_find_user(config, &entry, strings))
        vmm_add_misfit(out, "this host has no such user as in config/jail_user (add it)");
}

static int fc_prepare(const struct vmm_config *config, char **ret_why) {
    cleanup_free char *root = NULL;
    struct passwd entry;
    char strings[FC_USER_STRINGS];
    if (!fc_is_jailed(config))
        return 0;
    struct passwd *user = fc_find_user(config, &entry, strings);
    root = fc_jail_root(config->dir);
    int status = !user ? -ENOENT : root ? fc_fill_jail(config, root, user) : -ERR_NO_MEMORY;
    return status < 0 ? error_explain(status, ret_why, "the jail in %s cannot be filled: %s",
                                      config->dir, strerror(-status))
                      : 0;
}

/* The jailer's part of the command line, up to where Firecracker's begins. The paths of the jail
 * may be long, those of sockets may not: so the usual ones lead there. */
static int fc_add_jailer(const struct vmm_config *config, const char *vsock, const char *program,
                         const char *id, struct rest_plan *plan) {
    cleanup_free char *jailer = NULL, *root = fc_jail_root(config->dir);
    cleanup_free char *jailed_socket = NULL, *jailed_vsock = NULL;
    struct passwd *user = getpwnam(config->jail_user);
    if (!user || !root || host_find_program(FC_JAILER, &jailer) < 0)
        return -ENOENT;
    jailed_socket = host_join(root, &FC_JAILED_SOCKET[1]);
    jailed_vsock = host_join(root, &FC_JAILED_VSOCK[1]);
    if (!jailed_socket || !jailed_vsock)
        return -ERR_NO_MEMORY;
    if (symlink(jailed_socket, config->socket) < 0 || symlink(jailed_vsock, vsock) < 0)
        return -errno;
    rest_add_argument(plan, "%s", jailer);
    rest_add_argument(plan, "--id");
    rest_add_argument(plan, "%s", id);
    rest_add_argument(plan, "--exec-file");
    rest_add_argument(plan, "%s", program);
    rest_add_argument(plan, "--uid");
    rest_add_argument(plan, "%u", (unsigned)user->pw_uid);
    rest_add_argument(plan, "--gid");
    rest_add_argument(plan, "%u", (unsigned)user->pw_gid);
    rest_add_argument(plan, "--chroot-base-dir");
    rest_add_argument(plan, "%s/" FC_JAIL, config->dir);
    rest_add_argument(plan, "--");
    return 0;
}

/* ---- the machine ---- */

static void fc_add_machine(const struct vmm_config *config, const char *vsock,
                           struct rest_plan *plan) {
    bool jailed = fc_is_jailed(config);
    const char *template = config->cpu_model && config->cpu_model[0] ? config->cpu_model : NULL;
    cleanup_buf struct buf boot_args = {0};
    buf_printf(&boot_args, FC_BOOT_ARGS "%s%s", config->boot_args ? " " : "",
               config->boot_args ? config->boot_args : "");
    rest_add_step(plan, "PUT", "/machine-config",
                  json_pack("{s:i, s:i, s:s*}", "vcpu_count", (int)config->vcpus, "mem_size_mib",
                            (int)config->memory, "cpu_template", template));
    rest_add_step(plan, "PUT", "/boot-source",
                  json_pack("{s:s, s:s*, s:s}", "kernel_image_path",
                            jailed ? "/kernel" : fc_kernel(config), "initrd_path",
                            jailed && config->initrd ? "/initrd" : config->initrd, "boot_args",
                            boot_args.data ? boot_args.data : ""));
    /* Writeback: what the guest has flushed is on the host's disk. */
    if (config->disk)
        rest_add_step(plan, "PUT", "/drives/disk",
                      json_pack("{s:s, s:s, s:b, s:b, s:s}", "drive_id", "disk", "path_on_host",
                                jailed ? "/disk" : config->disk, "is_root_device", 0,
                                "is_read_only", 0, "cache_type", "Writeback"));
    rest_add_step(
        plan, "PUT", "/vsock",
        json_pack("{s:i, s:s}", "guest_cid", FC_CID, "uds_path", jailed ? FC_JAILED_VSOCK : vsock));
    rest_add_step(plan, "PUT", "/entropy", json_object());
    if (config->tap && config->tap[0])
        rest_add_step(plan, "PUT", "/network-interfaces/eth0",
                      json_pack("{s:s, s:s}", "iface_id", "eth0", "host_dev_name", config->tap));
    rest_add_step(plan, "PUT", "/actions", json_pack("{s:s}", "action_type", "InstanceStart"));
    for (size_t i = 0; i < plan->step_count; i++)
        if (!plan->steps[i].body || boot_args.failed)
            plan->failed = -ERR_NO_MEMORY;
}

static int fc_plan(const struct vmm_config *config, const char *vsock, struct rest_plan *plan) {
    cleanup_free char *program = NULL;
    char id[32];
    bool jailed = fc_is_jailed(config);
    fc_print_id(config->dir, id, sizeof id);
    int status = fc_find_program(&program);
    if (status == 0 && jailed)
        status = fc_add_jailer(config, vsock, program, id, plan);
    if (status < 0)
        return status;
    if (!jailed) { /* the jailer adds these two itself */
        rest_add_argument(plan, "%s", program);
        rest_add_argument(plan, "--id");
        rest_add_argument(plan, "%s", id);
    }
    rest_add_argument(plan, "--api-sock");
    rest_add_argument(plan, "%s", jailed ? FC_JAILED_SOCKET : config->socket);
    /* Not to stdout, which is the guest's console. */
    rest_add_argument(plan, "--log-path");
    rest_add_argument(plan, "%s/" FC_LOG, jailed ? "" : config->dir);
    rest_add_argument(plan, "--level");
    rest_add_argument(plan, "Warning");
    fc_add_machine(config, vsock, plan);
    return 0;
}

static const struct rest_dialect fc_dialect = {
    .ops = &firecracker_ops,
    .title = FC_TITLE,
    .hello = {"GET", "/", NULL},
    .state = {"GET", "/", NULL},
    .pause = {"PATCH", "/vm", "{\"state\": \"Paused\"}"},
    .resume = {"PATCH", "/vm", "{\"state\": \"Resumed\"}"},
    .power_button = {"PUT", "/actions", "{\"action_type\": \"SendCtrlAltDel\"}"},
    .own_log = FC_LOG,
    .plan = fc_plan,
};

static int fc_create(uv_loop_t *loop, const struct vmm_config *config,
                     const struct vmm_events *events, void *arg, struct vmm **ret_vmm) {
    return rest_create(&fc_dialect, loop, config, events, arg, ret_vmm);
}

static int fc_adopt(uv_loop_t *loop, const struct vmm_config *config, const json_t *saved,
                    const struct vmm_events *events, void *arg, struct vmm **ret_vmm) {
    return rest_adopt(&fc_dialect, loop, config, saved, events, arg, ret_vmm);
}

static unsigned fc_end_strays(const char *dir) {
    char id[32];
    fc_print_id(dir, id, sizeof id);
    return process_kill_strays(id);
}

/* CpuTemplate in its specification. */
static bool fc_has_template(const char *name) {
    static const char *const templates[] = {"C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"};
    for (size_t i = 0; i < sizeof templates / sizeof *templates; i++)
        if (strcmp(name, templates[i]) == 0)
            return true;
    return false;
}

static void fc_add_misfits(const struct vmm_config *config, struct buf *out) {
    if (config->vcpus > FC_VCPUS_MOST)
        vmm_add_misfit(out, "it has 32 CPUs at most for a guest (config/vcpus)");
    if (config->cpu_model && config->cpu_model[0] && !fc_has_template(config->cpu_model))
        vmm_add_misfit(out, "config/cpu_model is none of its templates (C3, T2, T2S, T2CL, T2A, "
                            "V1N1, None; empty it)");
    if (fc_is_jailed(config))
        fc_add_misfits_of_jail(config, out);
}

/* Before 1.8 a kernel found its devices only if it was built to look for them on its command line,
 * as Debian's is not. */
static int fc_check(char **ret_why) {
    return rest_check(FC_TITLE, FC_PROGRAM, 1, 8, "put the static binary of its releases there",
                      ret_why);
}

const struct vmm_ops firecracker_ops = {
    .name = "firecracker",
    .traits = VMM_VSOCK | VMM_TAP | VMM_JAIL | VMM_CPU_MODEL,
    .check = fc_check,
    .find_program = fc_find_program,
    .add_misfits = fc_add_misfits,
    .prepare = fc_prepare,
    .create = fc_create,
    .adopt = fc_adopt,
    .end_strays = fc_end_strays,
    .save = rest_save,
    .stop = rest_stop,
    .pause = rest_pause,
    .kill = rest_kill,
    .endpoint = rest_endpoint,
    .describe = rest_describe,
    .release = rest_release,
};
