/* Cloud Hypervisor as a backend: https://www.cloudhypervisor.org. What it is told is one request
 * with the whole machine, and one that boots it. */
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "vmm/host.h"
#include "vmm/process.h"
#include "vmm/rest.h"

#define CH_PROGRAM "cloud-hypervisor"
#define CH_TITLE "Cloud Hypervisor"
#define CH_API "/api/v1"
#define CH_EVENTS "events.log"
#define CH_CID 3 /* the least that is free; each VMM has its own numbers */

static json_t *ch_machine(const struct vmm_config *config, const char *vsock) {
    json_t *machine = json_pack(
        "{s:{s:i,s:i}, s:{s:I}, s:{s:s,s:s*,s:s}, s:{s:s}, s:{s:s}, s:{s:s}, s:{s:i,s:s}}", "cpus",
        "boot_vcpus", (int)config->vcpus, "max_vcpus", (int)config->vcpus, "memory", "size",
        (json_int_t)config->memory << 20, "payload", "kernel",
        config->kernel_elf ? config->kernel_elf : config->kernel, "initramfs", config->initrd,
        "cmdline", config->boot_args ? config->boot_args : "", "rng", "src", "/dev/urandom",
        /* To its stdout: a file that it opens itself has a hole after it was truncated. */
        "serial", "mode", "Tty", "console", "mode", "Off", "vsock", "cid", CH_CID, "socket", vsock);
    if (machine && config->disk)
        json_object_set_new(machine, "disks",
                            json_pack("[{s:s,s:s}]", "path", config->disk, "image_type", "Raw"));
    if (machine && config->tap && config->tap[0])
        json_object_set_new(machine, "net", json_pack("[{s:s}]", "tap", config->tap));
    return machine;
}

static int ch_find_program(char **ret_path) {
    return host_find_program(CH_PROGRAM, ret_path);
}

static int ch_plan(const struct vmm_config *config, const char *vsock, struct rest_plan *plan) {
    cleanup_free char *program = NULL;
    int status = ch_find_program(&program);
    json_t *machine = ch_machine(config, vsock);
    if (status < 0 || !machine) {
        json_decref(machine);
        return status < 0 ? status : -ERR_NO_MEMORY;
    }
    rest_add_argument(plan, "%s", program);
    rest_add_argument(plan, "--api-socket");
    rest_add_argument(plan, "path=%s", config->socket);
    rest_add_argument(plan, "--event-monitor");
    rest_add_argument(plan, "path=%s/" CH_EVENTS, config->dir);
    rest_add_step(plan, "PUT", CH_API "/vm.create", machine);
    rest_add_step(plan, "PUT", CH_API "/vm.boot", NULL);
    return 0;
}

static const struct rest_dialect ch_dialect = {
    .ops = &cloud_hypervisor_ops,
    .title = CH_TITLE,
    .hello = {"GET", CH_API "/vmm.ping", NULL},
    .state = {"GET", CH_API "/vm.info", NULL},
    .pause = {"PUT", CH_API "/vm.pause", NULL},
    .resume = {"PUT", CH_API "/vm.resume", NULL},
    .power_button = {"PUT", CH_API "/vm.power-button", NULL},
    .quit = {"PUT", CH_API "/vmm.shutdown", NULL},
    .event_log = CH_EVENTS,
    .restarted = "\"rebooting\"",
    .plan = ch_plan,
};

static int ch_create(uv_loop_t *loop, const struct vmm_config *config,
                     const struct vmm_events *events, void *arg, struct vmm **ret_vmm) {
    return rest_create(&ch_dialect, loop, config, events, arg, ret_vmm);
}

static int ch_adopt(uv_loop_t *loop, const struct vmm_config *config, const json_t *saved,
                    const struct vmm_events *events, void *arg, struct vmm **ret_vmm) {
    return rest_adopt(&ch_dialect, loop, config, saved, events, arg, ret_vmm);
}

static unsigned ch_end_strays(const char *dir) {
    cleanup_buf struct buf word = {0};
    buf_printf(&word, "path=%s/" CH_EVENTS, dir);
    return word.failed ? 0 : process_kill_strays(word.data);
}

static int ch_check(char **ret_why) {
    return rest_check(CH_TITLE, CH_PROGRAM, 20, 0,
                      "put the static binary of its releases there, or install its package",
                      ret_why);
}

const struct vmm_ops cloud_hypervisor_ops = {
    .name = "cloud_hypervisor",
    .traits = VMM_VSOCK | VMM_TAP,
    .check = ch_check,
    .find_program = ch_find_program,
    .create = ch_create,
    .adopt = ch_adopt,
    .end_strays = ch_end_strays,
    .save = rest_save,
    .stop = rest_stop,
    .pause = rest_pause,
    .kill = rest_kill,
    .endpoint = rest_endpoint,
    .describe = rest_describe,
    .release = rest_release,
};
