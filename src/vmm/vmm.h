#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <uv.h>

#include "util/buf.h"
#include "vmm/backends.h"

/* Virtual machine monitors behind one table of operations (design, section 6: "Backends").
 *
 * A `struct vmm` is one instance: one VM in one VMM. The VM layer owns it, from create() or adopt()
 * to release(). All functions but check() are called in the loop's thread and never block;
 * callbacks are never called from inside the function that caused them. */

struct vmm;

typedef void vmm_paused(void *arg, int status, const char *why, const char *words);

/* What to boot. Borrowed for the call of create(). Paths are absolute. */
struct vmm_config {
    const char *id;     /* the VM's name */
    const char *dir;    /* the VM's private folder (0700): `serial.log`, `vmm.log` go here */
    const char *socket; /* path for the VMM's control socket, 107 bytes at most; owned by the VMM
                           instance, which unlinks it at the end */
    const char *kernel; /* Linux image (bzImage) */
    const char *kernel_elf; /* the same kernel as an ELF file, with an entry for PVH; NULL: none */
    const char *initrd;     /* NULL: none */
    const char *boot_args;  /* kernel command line */
    unsigned vcpus;
    unsigned memory;       /* MiB */
    const char *disk;      /* a file with the bytes of the guest's disk (raw); NULL: none */
    const char *cpu_model; /* in the backend's words; empty or NULL: its choice */
    unsigned vsock_port;   /* at which the guest serves SSH; 0: it does not use vsock */
    const char *tap;       /* network interface of the host for the guest's; empty or NULL: none */
    const char *jail_user; /* user to run the VMM as, in a jail; empty or NULL: no jail */
    bool transient;        /* the VMM is killed with the process that has called create() */
    /* Of a template and of a start from one (struct vmm_template_ops); NULL: neither. */
    const char *ram;          /* file with the guest's memory */
    const char *device_state; /* file with everything else that the machine is */
    const char *identity; /* file that a guest started from a template is given through its port;
                             NULL: a template is being made */
    /* Of a machine that exists already; nothing of the boot is set then. */
    const char *address; /* a name, or a numeric address */
    unsigned port;
};

/* What a VMM's end says. */
enum vmm_end {
    VMM_ENDED,       /* no more than the words */
    VMM_POWERED_OFF, /* the guest has done so itself, in order */
    /* Of a start from a template: */
    VMM_HINDERED, /* by the host (a signal of somebody's, no memory), whatever the template is */
    VMM_REFUSED,  /* it does not take the template, or has died of it */
};

/* What a VMM tells. `arg` is the caller's of create() or adopt(). */
struct vmm_events {
    /* The VMM is up, the guest's CPUs run and endpoint() answers. At most once. */
    void (*ready)(void *arg);
    /* The VMM's process is gone, wanted or not. Exactly once for each instance that was not
     * released before. `why` is a sentence,
     * `words` what the VMM has said itself at last, or "": for the user alone and no log, as they
     * may quote what it was told. */
    void (*exited)(void *arg, enum vmm_end end, const char *why, const char *words);
    /* What keeps ready() from coming, or the endpoint from being the right one; the backend goes on
     * trying. */
    void (*trouble)(void *arg, const char *why);
};

/* Where the guest's SSH server is reached. */
struct vmm_endpoint {
    struct sockaddr_storage address;
    socklen_t length;
    unsigned vsock_port; /* not 0: the address is a VMM's UNIX socket, to be asked for this port, */
    pid_t peer;          /* at which this process has to listen */
};

/* What a backend can, and what it asks for, beyond what all do. */
enum {
    VMM_VSOCK = 1 << 0,     /* the guest has to be reached by vsock */
    VMM_TAP = 1 << 1,       /* can use vmm_config.tap */
    VMM_JAIL = 1 << 2,      /* and .jail_user */
    VMM_CPU_MODEL = 1 << 3, /* and .cpu_model */
};

/* Warm starts. A template is a machine that has booted as far as it can without being anybody's; it
 * is saved into two files, `ram` and `device_state` of the configuration, and create() with these
 * goes on from there, any number of times. The guest reads who it is (`identity`) from a virtio
 * port, as contrib/guest/README.md says. */
struct vmm_template;
struct vmm_template_ops {
    /* Appends text that changes whenever templates of this configuration become useless: a newer
     * VMM, another command line, another CPU. Blocks shortly. */
    int (*fingerprint)(const struct vmm_config *config, struct buf *out);

    /* Boots the machine, at a time when nobody else needs the CPU, and saves it. `done` is told
     * when the VMM has ended: 0, and the files are complete, or why not. They are the caller's to
     * remove in any case. It does not outlive the daemon. */
    int (*make)(uv_loop_t *loop, const struct vmm_config *config,
                void (*done)(void *arg, int status, const char *why), void *arg,
                struct vmm_template **ret_template);

    /* Ends that, also when it is done. No callback comes after this. NULL is allowed. */
    void (*release)(struct vmm_template *template);
};

struct vmm_ops {
    const char *name; /* as in `config/backend` */
    bool existing;    /* the machine is there already: it is not booted but attached, from no image
                         and with nothing put into it; stop() leaves it running */
    unsigned traits;  /* of VMM_VSOCK, … */

    const struct vmm_template_ops *templates; /* NULL: every start is a cold one */

    /* Can this backend work on this machine? 0, or -errno and in *ret_why a sentence that names
     * what is missing and the remedy (the caller frees it; also set on success, to say what was
     * found, such as "QEMU 7.2 without KVM"). Blocks: called before anything is mounted and in the
     * thread pool, once at a time. */
    int (*check)(char **ret_why);

    /* The program that check() looks at, an absolute path that the caller frees; -ENOENT: it is not
     * there. NULL: there is none. At once. */
    int (*find_program)(char **ret_path);

    /* Adds, with vmm_add_misfit(), what of this it cannot do beyond what `traits` say. May be NULL,
     * and may start programs and wait for them. */
    void (*add_misfits)(const struct vmm_config *config, struct buf *out);

    /* What has to be done before create() and takes its time: called in the thread pool. On error
     * *ret_why is a sentence (the caller frees it). May be NULL. */
    int (*prepare)(const struct vmm_config *config, char **ret_why);

    /* Spawns the VMM for a new boot of the guest. Errors that are known at once come back as
     * -errno. */
    int (*create)(uv_loop_t *loop, const struct vmm_config *config, const struct vmm_events *events,
                  void *arg, struct vmm **ret_vmm);

    /* Takes over a VMM that an earlier daemon left running, from what save() gave. -ESRCH when that
     * process is gone (the pid may have been given to another: the start time is compared). */
    int (*adopt)(uv_loop_t *loop, const struct vmm_config *config, const json_t *saved,
                 const struct vmm_events *events, void *arg, struct vmm **ret_vmm);

    /* Ends what create() has started for the VM of this folder and no record tells of: the daemon
     * was killed before it could write that, or it is damaged. Returns how many. May be NULL. */
    unsigned (*end_strays)(const char *dir);

    /* What a later daemon needs for adopt(); the caller owns it. NULL while there is nothing to
     * adopt. */
    json_t *(*save)(const struct vmm *vmm);

    /* Asks the guest to power down; after `powerdown_ms` the VMM to quit; after `quit_ms` more it
     * is killed. The end is told by exited(). Calling it again, or kill() later, is allowed. */
    void (*stop)(struct vmm *vmm, unsigned powerdown_ms, unsigned quit_ms);

    /* Stops the guest's CPUs, or lets them go on; `done` (may be NULL) is told with the `arg` of
     * the events, unless exited() or release() comes first. `why`, and `words` as of exited(), are
     * valid for the call. NULL: this backend cannot. */
    void (*pause)(struct vmm *vmm, bool paused, vmm_paused *done);

    /* SIGKILL, now. The end is told by exited(). */
    void (*kill)(struct vmm *vmm);

    /* Where SSH is; false as long as that is not known. */
    bool (*endpoint)(const struct vmm *vmm, struct vmm_endpoint *ret_endpoint);

    /* The endpoint has not answered: a backend that knows of others, or can look for them, offers
     * the next. May be NULL. */
    void (*no_answer)(struct vmm *vmm);

    /* Adds what a user may want to know to `info` (pid, accelerator, …). */
    void (*describe)(const struct vmm *vmm, json_t *info);

    /* Lets go of the instance: no callback comes after this. A VMM that runs goes on running, for a
     * later daemon to adopt. May be called from inside a callback. */
    void (*release)(struct vmm *vmm);
};

/* Every instance starts with this, so that whoever holds one finds its operations. */
struct vmm {
    const struct vmm_ops *ops;
};

/* The backend called `name`, for booting this; "auto" is the first that works here and can boot it.
 * With NULL, which is for when that is not known yet, it has to work here. -EINVAL for a name that
 * is none, -EOPNOTSUPP for one that does not work here or cannot boot this. *ret_why as in check(),
 * for "auto" also why the ones before it are not taken, on error why each is not. From any thread;
 * may start programs and wait for them. */
int vmm_find(const char *name, const struct vmm_config *config, const struct vmm_ops **ret_ops,
             char **ret_why);

/* For add_misfits(): what it cannot do, a few words that name the setting, without its value, and
 * with the remedy in parentheses. */
void vmm_add_misfit(struct buf *out, const char *words);

/* How much of a *ret_why is about the backend that was found, not about those before it. */
size_t vmm_brief_length(const char *why);

/* end_strays() of all backends. Returns how many were ended. */
unsigned vmm_end_strays(const char *dir);

/* The backend of this name, whether it works here or not, for what runs in it already. NULL: there
 * is none. At once. */
const struct vmm_ops *vmm_named(const char *name);

/* Is this backend for machines that exist already? At once, without looking whether it works. */
bool vmm_is_for_existing(const char *name);

#define VMM_DECLARE(name, automatic) extern const struct vmm_ops name##_ops;
VMM_BACKENDS(VMM_DECLARE)
#undef VMM_DECLARE
