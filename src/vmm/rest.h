#pragma once

#include "vmm/vmm.h"

/* What Firecracker and Cloud Hypervisor have in common: a process of its own, told by a REST
 * interface on a UNIX socket which machine to make, whose serial console is its stdout, and whose
 * guest is reached by vsock: the VMM listens on another UNIX socket, and connects whoever says
 * `CONNECT PORT` there. How each of them is talked to is a `struct rest_dialect`.
 *
 * What is true is what the process says: the socket going away is no end of the VM, the pidfd is.
 */

/* A request that never changes. */
struct rest_call {
    const char *method, *path; /* NULL: there is none */
    const char *body;          /* JSON text; NULL: none */
};

#define REST_ARGUMENTS_MAX 24
#define REST_STEPS_MAX 10

/* One boot: how the VMM is called, and the requests that make the machine and start it, in order.
 */
struct rest_plan {
    char *arguments[REST_ARGUMENTS_MAX + 1]; /* owned; the first is the program */
    size_t argument_count;
    struct rest_step {
        const char *method, *path;
        json_t *body; /* owned; NULL: none */
    } steps[REST_STEPS_MAX];
    size_t step_count;
    int failed; /* 0, or the first error: checked once, at the end */
};

/* Adds an argument, or a request, whose body it takes over. */
void rest_add_argument(struct rest_plan *plan, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void rest_add_step(struct rest_plan *plan, const char *method, const char *path, json_t *body);

void rest_free_plan(struct rest_plan *plan);

struct rest_dialect {
    const struct vmm_ops *ops;
    const char *title;      /* for sentences */
    struct rest_call hello; /* answered as soon as it listens */
    struct rest_call state; /* its answer has a member "state" */
    struct rest_call pause, resume;
    struct rest_call power_button; /* asks the guest to power down */
    struct rest_call quit;         /* ends the VMM; NULL: it can only be killed */
    const char *event_log; /* of the VM's folder, in which the VMM notes what happens; NULL */
    const char *restarted; /* what is in there when the guest has restarted */
    const char *own_log;   /* of the VM's folder, beside vmm.log; NULL */

    /* Fills the plan. `vsock` is the path for the guest's UNIX socket. */
    int (*plan)(const struct vmm_config *config, const char *vsock, struct rest_plan *plan);
};

/* For the members of vmm_ops with these names. */
int rest_create(const struct rest_dialect *dialect, uv_loop_t *loop,
                const struct vmm_config *config, const struct vmm_events *events, void *arg,
                struct vmm **ret_vmm);
int rest_adopt(const struct rest_dialect *dialect, uv_loop_t *loop, const struct vmm_config *config,
               const json_t *saved, const struct vmm_events *events, void *arg,
               struct vmm **ret_vmm);
json_t *rest_save(const struct vmm *vmm);
void rest_stop(struct vmm *vmm, unsigned powerdown_ms, unsigned quit_ms);
void rest_pause(struct vmm *vmm, bool paused, vmm_paused *done);
void rest_kill(struct vmm *vmm);
bool rest_endpoint(const struct vmm *vmm, struct vmm_endpoint *ret_endpoint);
void rest_describe(const struct vmm *vmm, json_t *info);
void rest_release(struct vmm *vmm);

/* For vmm_ops.check(): looks for `program` and asks for its version, which has to be at least
 * `major`.`minor`, and for KVM. `title` and `remedy` are for sentences. */
int rest_check(const char *title, const char *program, unsigned major, unsigned minor,
               const char *remedy, char **ret_why);
