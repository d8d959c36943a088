#include "vm/daemon.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>

#include "util/cleanup.h"
#include "util/fs.h"
#include "util/log.h"
#include "vm/command.h"
#include "vm/console.h"
#include "vm/control.h"
#include "vm/prepare.h"
#include "vm/record.h"
#include "vm/vars.h"
#include "vm/vm.h"
#include "vm/warm.h"
#include "vmm/vmm.h"

/* The state directory: its lock, the daemon's own key, the VMs that are recorded in it. */

static int daemon_fail(char **ret_why, int status, const char *what, const char *path) {
    if (asprintf(ret_why, "%s %s: %s", what, path, strerror(-status)) < 0)
        *ret_why = NULL;
    return status;
}

/* A directory of ours: nobody else's, open to nobody else. */
static int daemon_own_directory(const char *path, char **ret_why) {
    struct stat st;
    int r = fs_mkdir_all(path, 0700); /* what is there already stays as it is */
    if (r == 0 && lstat(path, &st) < 0)
        r = -errno;
    if (r < 0)
        return daemon_fail(ret_why, r, "cannot make", path);
    if (!S_ISDIR(st.st_mode) || st.st_uid != getuid())
        return daemon_fail(ret_why, -EPERM,
                           "is not a directory of the user who starts vmsfs:", path);
    if ((st.st_mode & 022) == 0)
        return 0; /* what is in it is private by itself */
    if (asprintf(ret_why,
                 "%s can be written by other users of this host: `chmod 700` it if it is for vmsfs "
                 "alone, or "
                 "choose another directory with -o state=DIR",
                 path) < 0)
        *ret_why = NULL;
    return -EPERM;
}

/* So that who finds it taken can say by whom. */
static int daemon_sign_lock(const struct daemon *d) {
    char text[32];
    int length = snprintf(text, sizeof text, "%d\n", getpid());
    if (ftruncate(d->lock_fd, 0) < 0 || pwrite(d->lock_fd, text, (size_t)length, 0) < 0)
        log_warn("cannot write the lock's owner: %s", strerror(errno));
    return 0;
}

#define LOCK_WAIT_MS 2000 /* for a daemon that has just been unmounted */
#define LOCK_STEP_MS 10

/* Who has the lock has signed it, or does in the next moment: what was there before is of a daemon
 * that has died. 0: not known. */
static pid_t daemon_lock_owner(const struct daemon *d) {
    char text[32] = "";
    pid_t owner =
        pread(d->lock_fd, text, sizeof text - 1, 0) > 0 ? (pid_t)strtol(text, NULL, 10) : 0;
    return owner > 0 && (kill(owner, 0) == 0 || errno == EPERM) ? owner : 0;
}

static int daemon_lock(struct daemon *d, char **ret_why) {
    cleanup_free char *path = NULL;
    if (asprintf(&path, "%s/lock", d->settings.state_dir) < 0)
        return -ENOMEM;
    d->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (d->lock_fd < 0)
        return daemon_fail(ret_why, -errno, "cannot open", path);
    for (unsigned waited = 0; waited <= LOCK_WAIT_MS; waited += LOCK_STEP_MS) {
        if (flock(d->lock_fd, LOCK_EX | LOCK_NB) == 0)
            return daemon_sign_lock(d);
        nanosleep(&(struct timespec){.tv_nsec = LOCK_STEP_MS * 1000000L}, NULL);
    }
    pid_t owner = daemon_lock_owner(d);
    char process[32] = "unknown";
    if (owner)
        snprintf(process, sizeof process, "%d", (int)owner);
    if (asprintf(ret_why,
                 "another vmsfs (process %s) uses the state directory %s: unmount that one first, "
                 "or choose another directory with -o state=DIR",
                 process, d->settings.state_dir) < 0)
        *ret_why = NULL;
    close(d->lock_fd);
    d->lock_fd = -1; /* what it protects is not ours to clear away */
    return -EBUSY;
}

static int daemon_key(struct daemon *d, char **ret_why) {
    cleanup_free char *public_path = NULL;
    struct buf text = {0};
    if (asprintf(&d->key_path, "%s/id_ed25519", d->settings.state_dir) < 0 ||
        asprintf(&public_path, "%s.pub", d->key_path) < 0)
        return -ENOMEM;
    if (access(public_path, R_OK) < 0) {
        const char *const keygen[] = {"ssh-keygen", "-q",    "-t", "ed25519",   "-N", "",
                                      "-C",         "vmsfs", "-f", d->key_path, NULL};
        unlink(d->key_path);
        int r = fs_run(keygen);
        if (r < 0)
            return daemon_fail(ret_why, r, "ssh-keygen (package openssh-client) could not make",
                               d->key_path);
    }
    int r = fs_read(public_path, 4096, &text);
    if (r < 0) {
        buf_free(&text);
        return daemon_fail(ret_why, r, "cannot read", public_path);
    }
    d->key_public = buf_steal(&text, NULL);
    return d->key_public ? 0 : -ENOMEM;
}

/* Calls `visit` with the path of each folder in STATE/`name`; a negative return ends it. */
static int daemon_each(struct daemon *d, const char *name,
                       int (*visit)(struct daemon *d, const char *path, char **ret_why),
                       char **ret_why) {
    cleanup_free char *path = NULL;
    if (asprintf(&path, "%s/%s", d->settings.state_dir, name) < 0)
        return -ENOMEM;
    int r = daemon_own_directory(path, ret_why);
    if (r < 0)
        return r;
    DIR *dir = opendir(path);
    if (!dir)
        return daemon_fail(ret_why, -errno, "cannot read", path);
    for (struct dirent *entry; r >= 0 && (entry = readdir(dir));) {
        cleanup_free char *one = NULL;
        if (entry->d_name[0] != '.' && asprintf(&one, "%s/%s", path, entry->d_name) >= 0)
            r = visit(d, one, ret_why);
    }
    closedir(dir);
    return r;
}

static int daemon_load_one(struct daemon *d, const char *path, char **ret_why) {
    const char *name = strrchr(path, '/') + 1;
    cleanup_free char *why = NULL;
    struct vm *vm;
    if (!vm_id_is_valid(name)) {
        log_error("%s holds no VM; it is left alone", path);
        return 0;
    }
    int r = vm_load(d, path, name, VM_ORDINARY, &vm, &why);
    if (record_lacks_resources(r)) {
        *ret_why = why;
        why = NULL;
        return r;
    }
    if (r < 0)
        vm = vm_load_unreadable(d, path, name, VM_ORDINARY, why);
    if (!vm)
        return -ENOMEM;
    if (vm->number > d->last_number)
        d->last_number = vm->number;
    registry_add(d, vm);
    if (vm->made_from)
        prepare_finish(vm);
    if (vm->ephemeral) {
        log_info("%s: its mount, which was ephemeral, has ended", vm->id);
        vm_destroy(vm, NULL);
        return 0;
    }
    if (vm->boot_again && vm_boot(vm) < 0)
        log_error("%s: cannot be booted", vm->id);
    return 0;
}

/* VMs whose destruction a killed daemon did not finish. */
static int daemon_clear_one(struct daemon *d, const char *path, char **ret_why) {
    cleanup_free char *why = NULL;
    struct vm *vm;
    uint64_t number = strtoull(strrchr(path, '/') + 1, NULL, 10);
    (void)ret_why;
    if (number > d->last_number && number < UINT32_MAX)
        d->last_number = number;
    int r = vm_load(d, path, NULL, VM_ORDINARY, &vm, &why);
    if (r == 0)
        vm_destroy(vm, NULL);
    else if (record_lacks_resources(r))
        log_error("%s is left to the next start: %s", path, why ? why : strerror(-r));
    else /* what ran had been ended before it came here */
        fs_remove_all(path);
    return 0;
}

/* Those who have none are given one when all that are taken are known. */
static void daemon_number(struct daemon *d) {
    struct vm *vm;
    if (!d->defaults->number)
        d->defaults->number = ++d->last_number;
    RB_FOREACH(vm, vm_index, &d->prepared) {
        if (!vm->number)
            vm->number = ++d->last_number;
    }
    RB_FOREACH(vm, vm_index, &d->vms) {
        if (!vm->number)
            vm->number = ++d->last_number;
    }
}

static bool daemon_runs_number(const struct daemon *d, uint64_t number) {
    struct vm *vm;
    struct vm_index *vms = (struct vm_index *)(uintptr_t)&d->vms;
    RB_FOREACH(vm, vm_index, vms) {
        if (vm->vmm && vm->number == number)
            return true;
    }
    for (const struct list *l = d->ending.next; l != &d->ending; l = l->next) {
        vm = LIST_OWNER(l, struct vm, ending);
        if (vm->vmm && vm->number == number)
            return true;
    }
    return false;
}

/* Sockets are called by the number of their VM. Of those whose VMM was not taken over, nobody else
 * knows any more. */
static void daemon_sweep_sockets(const struct daemon *d) {
    DIR *dir = opendir(d->settings.runtime_dir);
    if (!dir)
        return;
    for (struct dirent *entry; (entry = readdir(dir));) {
        char *end;
        uint64_t number = strtoull(entry->d_name, &end, 10);
        if (end != entry->d_name && *end == '.' && !daemon_runs_number(d, number))
            unlinkat(dirfd(dir), entry->d_name, 0);
    }
    closedir(dir);
}

#define HOUSEKEEPING_MS 1000
#define HOUSEKEEPING_RARE 5 /* of these turns */

static void daemon_keep_house(uv_timer_t *timer) {
    struct daemon *d = timer->data;
    struct vm *vm;
    bool rare = ++d->house_turns % HOUSEKEEPING_RARE == 0;
    d->looked_at = 0;
    warm_keep_house(d);
    if (rare && d->trim) { /* what sessions leave free is between what is in use */
        d->trim = false;
        malloc_trim(0);
    }
    RB_FOREACH(vm, vm_index, &d->vms) {
        if (vm->vmm && rare)
            console_bound(vm);
        vm_check_life(vm);
        d->looked_at += vars_are_looked_at(vm->vars);
    }
}

static int daemon_start_housekeeping(struct daemon *d) {
    d->housekeeping = malloc(sizeof *d->housekeeping);
    if (!d->housekeeping)
        return -ENOMEM;
    uv_timer_init(d->loop, d->housekeeping);
    d->housekeeping->data = d;
    return uv_timer_start(d->housekeeping, daemon_keep_house, HOUSEKEEPING_MS, HOUSEKEEPING_MS);
}

int daemon_open(struct daemon *d, char **ret_why) {
    RB_INIT(&d->vms);
    RB_INIT(&d->prepared);
    list_init(&d->ending);
    d->lock_fd = -1;
    d->uid = getuid();
    d->gid = getgid();
    clock_gettime(CLOCK_REALTIME, &d->started);
    /* Numbers of VMs are not used twice, also when none is left that tells the last. */
    d->last_number = (uint64_t)d->started.tv_sec;
    int r = daemon_own_directory(d->settings.state_dir, ret_why);
    if (r == 0)
        r = daemon_lock(d, ret_why);
    /* The holder of the lock removes it at its end. */
    if (r == 0)
        r = daemon_own_directory(d->settings.runtime_dir, ret_why);
    if (r == 0)
        r = daemon_key(d, ret_why);
    if (r == 0)
        r = warm_open(d);
    if (r == 0 && (r = prepare_load(d, ret_why)) < 0 && !*ret_why)
        daemon_fail(ret_why, r, "cannot bring back what is prepared in", d->settings.state_dir);
    if (r == 0)
        r = daemon_each(d, "vms", daemon_load_one, ret_why);
    if (r == 0)
        r = daemon_each(d, "trash", daemon_clear_one, ret_why);
    if (r == 0) {
        daemon_number(d);
        daemon_sweep_sockets(d);
    }
    return r < 0 ? r : daemon_start_housekeeping(d);
}

bool daemon_is_settled(const struct daemon *d) {
    struct vm *vm;
    struct vm_index *vms = (struct vm_index *)(uintptr_t)&d->vms;
    RB_FOREACH(vm, vm_index, vms) {
        if (vm->state == VM_UNREACHABLE)
            return false;
    }
    return true;
}

void daemon_end_commands(struct daemon *d) {
    struct vm *vm;
    RB_FOREACH(vm, vm_index, &d->vms) {
        commands_kill_all(vm->commands);
    }
}

bool daemon_is_idle(const struct daemon *d) {
    struct vm *vm;
    struct vm_index *vms = (struct vm_index *)(uintptr_t)&d->vms;
    RB_FOREACH(vm, vm_index, vms) {
        if (!control_is_idle(vm->control))
            return false;
    }
    return true;
}

void daemon_end_session(struct daemon *d) {
    struct vm *vm, *next;
    for (vm = RB_MIN(vm_index, &d->vms); vm; vm = next) {
        next = RB_NEXT(vm_index, &d->vms, vm);
        if (vm->ephemeral)
            vm_destroy(vm, NULL);
    }
}

void daemon_close(struct daemon *d) {
    struct vm *vm, *next;
    d->closing = true;
    warm_close(d);
    if (d->housekeeping)
        uv_close((uv_handle_t *)d->housekeeping, (uv_close_cb)free);
    d->housekeeping = NULL;
    for (vm = RB_MIN(vm_index, &d->vms); vm; vm = next) {
        next = RB_NEXT(vm_index, &d->vms, vm);
        if (uv_is_active((uv_handle_t *)vm->save_timer))
            vm_save(vm);
        if (!vm->saving) /* else when its record has been written */
            vm_release(vm);
    }
    prepare_release(d);
}

void daemon_free(struct daemon *d) {
    if (d->lock_fd >= 0) {
        rmdir(d->settings.runtime_dir); /* unless VMs go on running */
        close(d->lock_fd);
    }
    warm_free(d);
    free(d->key_path);
    free(d->key_public);
    free(d->settings.mountpoint);
    free(d->settings.state_dir);
    free(d->settings.runtime_dir);
    free(d->settings.program);
    free(d->settings.images_dir);
    config_free(&d->settings.config);
}
