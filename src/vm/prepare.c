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
#include "vm/forward.h"
#include "vm/image.h"
#include "vm/vars.h"
#include "vmm/vmm.h"

#define FORWARD_LIMIT 65536
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
    if (!vm_id_is_valid(name))
        r = -ERR_INVALID;
    else if (prepare_find(d, name))
        r = -ERR_EXISTS;
    else if (vm->saving)
        r = -ERR_BUSY;
    else if (!dir || !id)
        r = -ERR_NO_MEMORY;
    else if (rename(vm->dir, dir) < 0)
        r = -errno;
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
    vm_save(vm);
    return 0;
}

int prepare_set_forward(struct vm *vm, const char *text, size_t length, struct vm_wait *wait) {
    cleanup_free char *why = NULL;
    if (vm->gone)
        return -ERR_GONE;
    if (length > FORWARD_LIMIT)
        return vm_fail(vm, -ERR_TOO_LARGE, "forward takes %d bytes at most", FORWARD_LIMIT);
    if (forward_check(text, length, &why) < 0)
        return vm_fail(vm, -ERR_INVALID, "%s", why ? why : "");
    cleanup_buf struct buf copy = {0};
    buf_append(&copy, text, length);
    if (copy.failed)
        return -ERR_NO_MEMORY;
    buf_free(&vm->forward);
    vm->forward = copy;
    copy = (struct buf){0};
    clock_gettime(CLOCK_REALTIME, &vm->changed);
    vm_save_for(vm, wait);
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

/* What can be known to be missing is said before anything is made. */
static void creation_check(struct creation *c) {
    const struct vmm_ops *backend;
    struct image image;
    cleanup_free char *why = NULL;
    c->status = vmm_find(c->config.backend, true, &backend, &why);
    if (c->status == 0 && !backend->existing) {
        free(why);
        why = NULL;
        c->status = image_open(&c->d->settings, c->config.image, &image, &why);
        if (c->status == 0)
            image_close(&image);
    }
    if (c->status < 0) {
        c->why = why;
        why = NULL;
        c->status = -ERR_INVALID;
    }
}

static void creation_work(uv_work_t *work) {
    struct creation *c = work->data;
    if (c->checks)
        creation_check(c);
    if (c->status == 0 && c->wants_environ)
        creation_read_environ(c);
}

static int creation_set(void *arg, const char *name, const char *value, size_t length) {
    struct vm *vm = arg;
    cleanup_buf struct buf bytes = {0};
    buf_append(&bytes, value, length);
    buf_append_char(&bytes, '\n');
    int r = bytes.failed ? -ERR_NO_MEMORY : vars_preset(vm->vars, name, bytes.data, bytes.len);
    if (bytes.data)
        explicit_bzero(bytes.data, bytes.len);
    return r;
}

static int creation_forward(struct creation *c, const struct buf *forward, struct vm *vm) {
    return forward_apply(forward->data ? forward->data : "", forward->len,
                         c->environ.data ? c->environ.data : "", c->environ.len, creation_set, vm,
                         &c->why);
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
        r = creation_forward(c, &c->d->defaults->forward, vm);
    if (r == 0 && c->prepared)
        r = creation_forward(c, &c->prepared->forward, vm);
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
        return r;
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
    if (c->wants_environ || c->checks)
        c->status = uv_queue_work(d->loop, &c->work, creation_work, creation_after);
    if (c->status < 0 || (!c->wants_environ && !c->checks))
        creation_done(c);
}

/* ---- over restarts ---- */

static int prepare_load_defaults(struct daemon *d) {
    cleanup_free char *dir = NULL, *path = NULL;
    if (asprintf(&dir, "%s/defaults", d->settings.state_dir) < 0)
        return -ENOMEM;
    int r = fs_mkdir_all(dir, 0700);
    if (r < 0)
        return r;
    d->defaults = vm_load(d, dir);
    if (!d->defaults && asprintf(&path, "%s/vm.json", dir) < 0)
        return -ENOMEM;
    if (!d->defaults)
        d->defaults = access(path, F_OK) < 0 ? vm_new(d, "defaults", ++d->last_number, dir)
                                             : vm_load_unreadable(d, "defaults", dir);
    if (!d->defaults)
        return -ENOMEM;
    d->defaults->role = VM_DEFAULTS;
    d->defaults->state = VM_STOPPED;
    return 0;
}

static void prepare_load_one(struct daemon *d, const char *path, const char *name) {
    struct vm *vm = vm_load(d, path);
    if (!vm)
        vm = vm_load_unreadable(d, name, path);
    if (!vm)
        return;
    if (strcmp(vm->id, name) != 0) {
        log_error("%s is the record of another VM, %s; it is left alone", path, vm->id);
        vm_release(vm);
        return;
    }
    vm->role = VM_PREPARED;
    vm->state = VM_STOPPED;
    if (vm->number > d->last_number)
        d->last_number = vm->number;
    RB_INSERT(vm_index, &d->prepared, vm);
}

int prepare_load(struct daemon *d) {
    cleanup_free char *path = NULL;
    int r = prepare_load_defaults(d);
    if (r < 0)
        return r;
    if (asprintf(&path, "%s/new", d->settings.state_dir) < 0)
        return -ENOMEM;
    r = fs_mkdir_all(path, 0700);
    DIR *dir = r == 0 ? opendir(path) : NULL;
    if (!dir)
        return r < 0 ? r : -errno;
    for (struct dirent *entry; (entry = readdir(dir));) {
        cleanup_free char *one = NULL;
        if (vm_id_is_valid(entry->d_name) && asprintf(&one, "%s/%s", path, entry->d_name) >= 0)
            prepare_load_one(d, one, entry->d_name);
    }
    closedir(dir);
    return 0;
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
