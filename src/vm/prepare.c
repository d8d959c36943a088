#include "vm/prepare.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "util/log.h"
#include "vm/boot.h"
#include "vm/forward.h"
#include "vm/image.h"
#include "vm/machine.h"
#include "vm/record.h"
#include "vm/vars.h"
#include "vmm/vmm.h"

#define ENVIRON_LIMIT (8 << 20) /* more than the kernel lets a process have by default */

struct vm *prepare_find(struct daemon *d, const char *name) {
    struct vm key = {.id = (char *)(uintptr_t)name};
    return RB_FIND(vm_index, &d->prepared, &key);
}

static char *prepare_path(const struct daemon *d, const char *name) {
    char *path;
    return asprintf(&path, "%s/new/%s", d->settings.state_dir, name) < 0 ? NULL : path;
}

int prepare_make(struct daemon *d, const char *name, struct vm **ret_vm) {
    cleanup_free char *dir = prepare_path(d, name);
    if (!vm_id_is_valid(name))
        return -ERR_INVALID;
    if (prepare_find(d, name))
        return -ERR_EXISTS;
    if (!dir)
        return -ERR_NO_MEMORY;
    int r;
    struct vm *vm = vm_make(d, name, &r);
    if (!vm)
        return r;
    config_free(&vm->config);
    r = config_copy(&vm->config, &d->defaults->config);
    vm->role = VM_PREPARED;
    RB_INSERT(vm_index, &d->prepared, vm);
    if (r == 0)
        r = vm_settle_in(vm, dir);
    if (r < 0) {
        prepare_remove(vm);
        return r;
    }
    *ret_vm = vm;
    return 0;
}

void prepare_note_maker(struct vm *vm, pid_t pid) {
    static const char *const copiers[] = {"cp\n", "mv\n"};
    cleanup_free char *path = NULL;
    char name[32] = "";
    if (pid <= 0 || asprintf(&path, "/proc/%d/comm", pid) < 0)
        return;
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, name, sizeof name - 1) <= 0)
        return;
    for (size_t i = 0; i < sizeof copiers / sizeof *copiers; i++)
        if (strcmp(name, copiers[i]) == 0)
            vm->copier = pid;
}

bool prepare_hides(struct vm *vm, uint64_t slot) {
    if (!vm->copier || (vm->shown & UINT64_C(1) << slot))
        return false;
    if (kill(vm->copier, 0) < 0 && errno == ESRCH)
        vm->copier = 0;
    return vm->copier != 0;
}

void prepare_show(struct vm *vm, uint64_t slot) {
    vm->shown |= UINT64_C(1) << slot;
}

void prepare_remove(struct vm *vm) {
    if (!vm->gone)
        RB_REMOVE(vm_index, &vm->daemon->prepared, vm);
    vm_destroy(vm, NULL);
}

int prepare_rename(struct vm *vm, const char *name) {
    struct daemon *d = vm->daemon;
    char *dir = prepare_path(d, name), *id = strdup(name);
    int r = 0;
    if (!vm_id_is_valid(name)) /* not EINVAL: see creation_check() */
        r = vm_fail(vm, -ERR_NOT_PERMITTED,
                    "a VM's name is of letters, digits and -, 63 at most, and does not begin with "
                    "-");
    else if (prepare_find(d, name))
        r = -ERR_EXISTS;
    else if (vm->saving)
        r = -ERR_BUSY;
    else if (!dir || !id)
        r = -ERR_NO_MEMORY;
    else if (rename(vm->dir, dir) < 0)
        r = error_of_host(-errno);
    if (r < 0) {
        free(dir);
        free(id);
        return r;
    }
    RB_REMOVE(vm_index, &d->prepared, vm);
    free(vm->dir);
    free(vm->id);
    vm->dir = dir;
    vm->id = id;
    RB_INSERT(vm_index, &d->prepared, vm);
    return 0; /* its folder says how it is called */
}

/* A change of `forward`: it holds at once, is acknowledged when the record is on the disk, and
 * taken back if that fails. */
struct forward_change {
    struct vm_wait save;
    struct vm *vm;            /* a reference */
    struct buf before, after; /* the texts */
    struct list waits;        /* of vm_wait: who has asked, if he has not gone away */
};

static bool buf_is_same(const struct buf *a, const struct buf *b) {
    return a->len == b->len && (!a->len || memcmp(a->data, b->data, a->len) == 0);
}

static void forward_saved(struct vm_wait *wait, int status) {
    struct forward_change *change = LIST_OWNER(wait, struct forward_change, save);
    struct vm *vm = change->vm;
    if (status < 0 && !vm->gone) {
        if (buf_is_same(&vm->forward, &change->after)) { /* else it has been changed since */
            struct buf after = vm->forward;
            vm->forward = change->before;
            change->before = after;
        }
        vm_fail(vm, status,
                "forward: the change could not be written to the host's disk, and was taken back: "
                "%s",
                error_text(status));
    }
    vm_wait_wake(&change->waits, status);
    vm_unref(vm);
    buf_free(&change->before);
    buf_free(&change->after);
    free(change);
}

int prepare_refuse_forward(struct vm *vm) {
    return vm_fail(vm, -ERR_TOO_LARGE, "forward takes %d bytes at most", FORWARD_LIMIT);
}

int prepare_set_forward(struct vm *vm, const char *text, size_t length, struct vm_wait *wait) {
    cleanup_free char *why = NULL;
    cleanup_buf struct buf copy = {0};
    if (vm->gone)
        return -ERR_GONE;
    if (length > FORWARD_LIMIT)
        return prepare_refuse_forward(vm);
    if (forward_check(text, length, vm->guest->name_is_reserved, &why) < 0)
        return vm_fail(vm, -ERR_INVALID, "%s", why ? why : "");
    struct forward_change *change = calloc(1, sizeof *change);
    buf_append(&copy, text, length);
    if (change)
        buf_append(&change->after, text, length);
    if (!change || copy.failed || change->after.failed) {
        if (change)
            buf_free(&change->after);
        free(change);
        return -ERR_NO_MEMORY;
    }
    change->save.done = forward_saved;
    change->vm = vm_ref(vm);
    change->before = vm->forward;
    list_init(&change->waits);
    if (wait)
        list_append(&change->waits, &wait->link);
    vm->forward = copy;
    copy = (struct buf){0};
    clock_gettime(CLOCK_REALTIME, &vm->changed);
    vm_save_for(vm, &change->save);
    return 0;
}

/* ---- making a VM ---- */

struct creation {
    uv_work_t work;
    struct list waits; /* of vm_wait: who asked, unless he has gone away */
    struct daemon *d;
    char *id;
    struct vm *prepared; /* a reference; NULL: none */
    struct asker asker;
    /* The worker's: copies of what it looks at, and what it finds. */
    bool wants_environ, checks;
    struct vm_config config;
    struct buf environ;
    int status;
    char *why;
};

static void creation_free(struct creation *c) {
    if (c->prepared)
        vm_unref(c->prepared);
    if (c->environ.data)
        explicit_bzero(c->environ.data, c->environ.len);
    buf_free(&c->environ);
    if (c->checks)
        config_free(&c->config);
    free(c->why);
    free(c->id);
    free(c);
}

/* The environment that the caller's process was started with: only that of the user whose daemon
 * this is, asked for by himself. (A process that may not be looked into belongs to root in /proc.)
 */
static void creation_read_environ(struct creation *c) {
    cleanup_free char *path = NULL;
    struct stat st;
    if (c->asker.uid != c->d->uid || c->asker.pid <= 0 ||
        asprintf(&path, "/proc/%d/environ", c->asker.pid) < 0)
        return;
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0 || st.st_uid != c->asker.uid)
        return;
    char block[16384];
    ssize_t n;
    while ((n = read(fd, block, sizeof block)) > 0 && c->environ.len < ENVIRON_LIMIT)
        buf_append(&c->environ, block, (size_t)n);
    explicit_bzero(block, sizeof block);
    if (c->environ.failed)
        c->status = -ERR_NO_MEMORY;
}

static int creation_refuse(struct creation *c, int status, const char *why) {
    c->why = strdup(why);
    return status;
}

/* What its backend needs. */
static int creation_check_backend(const struct creation *c, char **ret_why) {
    const struct vm_config *config = &c->config;
    const struct vmm_ops *backend;
    cleanup_buf struct buf host_key = {0};
    struct image image;
    int r = vmm_find(config->backend, NULL, &backend, ret_why);
    if (r < 0)
        return r;
    free(*ret_why); /* why this one */
    *ret_why = NULL;
    if (backend->existing && !config->address[0]) {
        *ret_why = strdup("where is the machine? Write its name or IP address to config/address");
        return -ERR_GONE;
    }
    if (backend->existing)
        return machine_prepare(config, config->key[0] ? config->key : c->d->key_path, &host_key,
                               ret_why);
    r = image_open(&c->d->settings, config->image, &image, ret_why);
    if (r < 0)
        return r;
    r = image_check_memory(&image, config->image, config->memory, ret_why);
    if (r == 0)
        r = image_check_disk(&image, config->image, config->disk, ret_why);
    if (r == 0)
        r = boot_find_backend(&c->d->settings, config, &image, &backend, ret_why);
    image_close(&image);
    if (r == 0) {
        free(*ret_why);
        *ret_why = NULL;
    }
    return r;
}

/* What can be known to go wrong is said before anything is made. Not by EINVAL: of a rename, mv
 * takes that for one into a directory of itself, and says so. */
static void creation_check(struct creation *c) {
    if (!vm_id_is_valid(c->id))
        c->status = creation_refuse(c, -ERR_NOT_PERMITTED,
                                    "a VM's name is of letters, digits and -, 63 at most, and does "
                                    "not begin with -");
    else if (creation_check_backend(c, &c->why) < 0)
        c->status = -ERR_GONE;
}

static void creation_work(uv_work_t *work) {
    struct creation *c = work->data;
    if (c->checks)
        creation_check(c);
    if (c->status == 0 && c->wants_environ)
        creation_read_environ(c);
}

struct creation_filling {
    struct creation *creation;
    struct vm *vm;
};

static int creation_set(void *arg, const char *name, const char *value, size_t length) {
    struct creation_filling *filling = arg;
    struct creation *c = filling->creation;
    cleanup_buf struct buf bytes = {0};
    buf_append(&bytes, value, length);
    buf_append_char(&bytes, '\n');
    int r =
        bytes.failed ? -ERR_NO_MEMORY : vars_preset(filling->vm->vars, name, bytes.data, bytes.len);
    if (bytes.data)
        explicit_bzero(bytes.data, bytes.len);
    if (r < 0 && !c->why &&
        asprintf(&c->why, "%s of the calling process, which `forward` names, cannot be taken: %s",
                 name, error_text(r)) < 0)
        c->why = NULL;
    return r;
}

static bool creation_has(void *arg, const char *name) {
    const struct creation_filling *filling = arg;
    const struct var *var = vars_find(filling->vm->vars, name);
    return var && var->set && var_value_length(var->bytes, var->length) > 0;
}

static int creation_forward(struct creation *c, struct vm *vm) {
    struct creation_filling filling = {c, vm};
    const struct buf *forwards[] = {&c->d->defaults->forward,
                                    c->prepared ? &c->prepared->forward : NULL};
    int r = 0;
    for (size_t i = 0; i < 2 && r == 0; i++)
        if (forwards[i] && forwards[i]->len)
            r = forward_apply(forwards[i]->data, forwards[i]->len,
                              c->environ.data ? c->environ.data : "", c->environ.len, creation_set,
                              &filling);
    for (size_t i = 0; i < 2 && r == 0; i++)
        if (forwards[i] && forwards[i]->len)
            r = forward_require(forwards[i]->data, forwards[i]->len, creation_has, &filling,
                                &c->why);
    return r;
}

static int creation_fill(struct vm *vm, void *arg) {
    struct creation *c = arg;
    const struct vm *from = c->prepared ? c->prepared : c->d->defaults;
    vm->made_from = c->prepared ? c->prepared->number : 0;
    config_free(&vm->config);
    int r = config_copy(&vm->config, &from->config);
    if (r == 0)
        r = vars_copy(vm->vars, c->d->defaults->vars);
    if (r == 0 && c->prepared)
        r = vars_copy(vm->vars, c->prepared->vars);
    if (r == 0)
        r = creation_forward(c, vm);
    return r;
}

/* Leaves words where the asker looks for them: in what he has prepared, or in the defaults. */
static int creation_finish(struct creation *c) {
    struct vm *vm, *place = c->prepared ? c->prepared : c->d->defaults;
    int r = c->status;
    if (r == 0 && c->prepared && c->prepared->gone)
        r = -ERR_NOT_FOUND;
    if (r == 0)
        r = vm_create(c->d, c->id, creation_fill, c, &vm);
    if (r < 0) {
        const char *why = c->why ? c->why : error_text(r);
        if (!place->gone)
            vm_fail(place, r, "%s was not made: %s", c->id, why);
        return r == -ERR_INVALID && c->prepared ? -ERR_GONE : r; /* see creation_check() */
    }
    if (c->prepared)
        prepare_remove(c->prepared);
    vm->made_from = 0;
    return 0;
}

static void creation_done(struct creation *c) {
    int r = list_is_empty(&c->waits) || c->d->closing ? -ERR_INTERRUPTED : creation_finish(c);
    vm_wait_wake(&c->waits, r);
    creation_free(c);
}

static void creation_after(uv_work_t *work, int status) {
    (void)status;
    creation_done(work->data);
}

void prepare_create(struct daemon *d, const char *id, struct vm *prepared,
                    const struct asker *asker, struct vm_wait *wait) {
    struct creation *c = calloc(1, sizeof *c);
    if (!c || !(c->id = strdup(id))) {
        free(c);
        wait->done(wait, -ERR_NO_MEMORY);
        return;
    }
    c->d = d;
    c->asker = *asker;
    c->work.data = c;
    list_init(&c->waits);
    list_append(&c->waits, &wait->link);
    c->prepared = prepared ? vm_ref(prepared) : NULL;
    const struct buf *forwards[] = {&d->defaults->forward, prepared ? &prepared->forward : NULL};
    for (size_t i = 0; i < 2; i++)
        c->wants_environ |=
            forwards[i] &&
            !forward_is_empty(forwards[i]->data ? forwards[i]->data : "", forwards[i]->len);
    c->checks = prepared && config_copy(&c->config, &prepared->config) == 0;
    bool works = c->wants_environ || c->checks;
    /* From here on `status` is the other thread's. */
    int r = works ? uv_queue_work(d->loop, &c->work, creation_work, creation_after) : 0;
    if (r < 0)
        c->status = -ERR_NO_MEMORY;
    if (r < 0 || !works)
        creation_done(c);
}

/* ---- over restarts ---- */

/* In `dir`, which is there; NULL in *ret_vm: nothing is recorded there. */
static int prepare_load_from(struct daemon *d, const char *dir, const char *name, enum vm_role role,
                             struct vm **ret_vm, char **ret_why) {
    cleanup_free char *why = NULL;
    *ret_vm = NULL;
    int r = vm_load(d, dir, name, role, ret_vm, &why);
    if (record_lacks_resources(r)) {
        *ret_why = why;
        why = NULL;
        return r;
    }
    if (r < 0 && (r != -ERR_NOT_FOUND || role == VM_PREPARED))
        *ret_vm = vm_load_unreadable(d, dir, name, role, why);
    if (*ret_vm)
        (*ret_vm)->state = VM_STOPPED;
    return r < 0 && r != -ERR_NOT_FOUND && !*ret_vm ? -ENOMEM : 0;
}

static int prepare_load_defaults(struct daemon *d, char **ret_why) {
    cleanup_free char *dir = NULL;
    if (asprintf(&dir, "%s/defaults", d->settings.state_dir) < 0)
        return -ENOMEM;
    int r = fs_mkdir_all(dir, 0700);
    if (r == 0)
        r = prepare_load_from(d, dir, "defaults", VM_DEFAULTS, &d->defaults, ret_why);
    if (r < 0 || d->defaults)
        return r;
    d->defaults = vm_new(d, "defaults", 0, dir);
    if (!d->defaults)
        return -ENOMEM;
    d->defaults->role = VM_DEFAULTS;
    return 0;
}

/* A folder that was copied has the number of the other. */
static bool prepare_knows_number(struct daemon *d, uint64_t number) {
    struct vm *vm;
    RB_FOREACH(vm, vm_index, &d->prepared) {
        if (vm->number == number)
            return true;
    }
    return false;
}

static int prepare_load_one(struct daemon *d, const char *path, const char *name, char **ret_why) {
    struct vm *vm;
    int r = prepare_load_from(d, path, name, VM_PREPARED, &vm, ret_why);
    if (r < 0)
        return r;
    if (prepare_knows_number(d, vm->number))
        vm->number = 0;
    if (vm->number > d->last_number)
        d->last_number = vm->number;
    RB_INSERT(vm_index, &d->prepared, vm);
    return 0;
}

int prepare_load(struct daemon *d, char **ret_why) {
    cleanup_free char *path = NULL;
    int r = prepare_load_defaults(d, ret_why);
    if (r < 0)
        return r;
    if (asprintf(&path, "%s/new", d->settings.state_dir) < 0)
        return -ENOMEM;
    r = fs_mkdir_all(path, 0700);
    DIR *dir = r == 0 ? opendir(path) : NULL;
    if (!dir)
        return r < 0 ? r : -errno;
    for (struct dirent *entry; r == 0 && (entry = readdir(dir));) {
        cleanup_free char *one = NULL;
        if (vm_id_is_valid(entry->d_name) && asprintf(&one, "%s/%s", path, entry->d_name) >= 0)
            r = prepare_load_one(d, one, entry->d_name, ret_why);
    }
    closedir(dir);
    return r;
}

void prepare_finish(struct vm *vm) {
    struct vm *prepared;
    RB_FOREACH(prepared, vm_index, &vm->daemon->prepared) {
        if (prepared->number == vm->made_from) {
            prepare_remove(prepared);
            break;
        }
    }
    vm->made_from = 0;
}

static void prepare_let_go(struct vm *vm) {
    if (uv_is_active((uv_handle_t *)vm->save_timer))
        vm_save(vm);
    if (!vm->saving) /* else when its record has been written */
        vm_release(vm);
}

void prepare_release(struct daemon *d) {
    struct vm *vm;
    while ((vm = RB_MIN(vm_index, &d->prepared))) {
        RB_REMOVE(vm_index, &d->prepared, vm);
        prepare_let_go(vm);
    }
    if (d->defaults)
        prepare_let_go(d->defaults);
}
