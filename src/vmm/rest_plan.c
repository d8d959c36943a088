#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "vmm/host.h"
#include "vmm/process.h"
#include "vmm/rest.h"

void rest_add_argument(struct rest_plan *plan, const char *format, ...) {
    cleanup_buf struct buf text = {0};
    va_list args;
    va_start(args, format);
    buf_vprintf(&text, format, args);
    va_end(args);
    char *argument = buf_steal(&text, NULL);
    if (!argument || plan->argument_count == REST_ARGUMENTS_MAX) {
        free(argument);
        plan->failed = -ERR_NO_MEMORY;
        return;
    }
    plan->arguments[plan->argument_count++] = argument;
}

void rest_add_step(struct rest_plan *plan, const char *method, const char *path, json_t *body) {
    if (plan->step_count == REST_STEPS_MAX) {
        json_decref(body);
        plan->failed = -ERR_NO_MEMORY;
        return;
    }
    plan->steps[plan->step_count++] = (struct rest_step){method, path, body};
}

void rest_free_plan(struct rest_plan *plan) {
    for (size_t i = 0; i < plan->argument_count; i++)
        free(plan->arguments[i]);
    for (size_t i = 0; i < plan->step_count; i++)
        json_decref(plan->steps[i].body);
    *plan = (struct rest_plan){0};
}

int rest_check(const char *title, const char *program, unsigned major, unsigned minor,
               const char *remedy, char **ret_why) {
    cleanup_free char *path = NULL;
    cleanup_buf struct buf why = {0}, output = {0};
    const char *no_kvm = NULL;
    unsigned has_major = 0, has_minor = 0;
    int status = host_find_program(program, &path);
    if (status == -ENOENT) {
        buf_printf(&why, "there is no %s in PATH (%s)", program, remedy);
    } else if (status == 0) {
        char *argv[] = {path, (char[]){"--version"}, NULL};
        status = process_run(path, argv, 5000, &output);
        /* `Firecracker v1.10.1`, `cloud-hypervisor v44.0.0` */
        const char *version = output.len ? strstr(output.data, " v") : NULL;
        if (status != 0 || !version || sscanf(version, " v%u.%u", &has_major, &has_minor) != 2) {
            buf_printf(&why, "%s --version does not work (%s)", path,
                       status < 0 ? strerror(-status) : "it fails, or says something else");
            status = status == -ETIMEDOUT ? -ERR_TIMED_OUT : -ERR_UNSUPPORTED;
        } else if (has_major < major || (has_major == major && has_minor < minor)) {
            buf_printf(&why, "%s is version %u.%u, and it has to be %u.%u or newer (%s)", path,
                       has_major, has_minor, major, minor, remedy);
            status = -ERR_UNSUPPORTED;
        } else if (!host_has_kvm(&no_kvm)) {
            buf_printf(&why, "%s %u.%u is there, but it needs KVM: %s", title, has_major, has_minor,
                       no_kvm);
            status = -ERR_UNSUPPORTED;
        } else {
            buf_printf(&why, "%s %u.%u with KVM", title, has_major, has_minor);
        }
    }
    *ret_why = why.len ? buf_steal(&why, NULL) : NULL;
    return status;
}
