#include "vm/orphans.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "guest/guest.h"
#include "util/cleanup.h"
#include "util/fs.h"
#include "util/log.h"
#include "vm/command.h"
#include "vm/control.h"

#define ORPHANS_MOST 1024
#define ORPHAN_LIFE_S 600 /* then its number may be another's: it is left alone */
#define ORPHANS_HEAD 64   /* bytes of the file: the guest's boot, its resident shell, blanks */
#define ORPHAN_LINE 12    /* bytes in the file: a process id and a newline */

struct orphans {
    struct vm *vm; /* the owner */
    struct orphan {
        long pid; /* 0: a free place */
        bool lost;
        time_t since; /* when it was lost */
    } * list;
    int count, cap; /* places in use, with gaps; and there are */
    int fd;         /* -1: not opened yet */
    char boot[40];
};

struct orphans *orphans_new(struct vm *vm) {
    struct orphans *orphans = calloc(1, sizeof *orphans);
    if (orphans) {
        orphans->vm = vm;
        orphans->fd = -1;
    }
    return orphans;
}

void orphans_free(struct orphans *orphans) {
    if (!orphans)
        return;
    if (orphans->fd >= 0)
        close(orphans->fd);
    free(orphans->list);
    free(orphans);
}

/* Room for one more place. */
static bool orphans_grow(struct orphans *orphans) {
    if (orphans->count < orphans->cap)
        return true;
    int cap = orphans->cap ? orphans->cap * 2 : 8;
    struct orphan *list =
        cap > ORPHANS_MOST ? NULL : realloc(orphans->list, (size_t)cap * sizeof *list);
    if (!list)
        return false;
    orphans->list = list;
    orphans->cap = cap;
    return true;
}

static char *orphans_path(const struct orphans *orphans) {
    char *path;
    return asprintf(&path, "%s/running", orphans->vm->dir) < 0 ? NULL : path;
}

static void orphans_write_head(const struct orphans *orphans) {
    char head[ORPHANS_HEAD + 1], words[ORPHANS_HEAD];
    snprintf(words, sizeof words, "%s %ld", orphans->boot, orphans->vm->facts.control);
    snprintf(head, sizeof head, "%-*s\n", ORPHANS_HEAD - 1, words);
    if (pwrite(orphans->fd, head, ORPHANS_HEAD, 0) != ORPHANS_HEAD)
        log_debug("%s: the commands that run cannot be noted", orphans->vm->id);
}

static void orphans_open(struct orphans *orphans) {
    cleanup_free char *path = orphans->fd < 0 ? orphans_path(orphans) : NULL;
    if (path)
        orphans->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (path && orphans->fd >= 0)
        orphans_write_head(orphans);
}

static void orphans_write(struct orphans *orphans, int place) {
    char line[ORPHAN_LINE + 1];
    orphans_open(orphans);
    snprintf(line, sizeof line, "%*ld\n", ORPHAN_LINE - 1, orphans->list[place].pid);
    if (orphans->fd < 0 || pwrite(orphans->fd, line, ORPHAN_LINE,
                                  ORPHANS_HEAD + (off_t)place * ORPHAN_LINE) != ORPHAN_LINE)
        log_debug("%s: a command that runs could not be noted", orphans->vm->id);
}

int orphans_note(struct orphans *orphans, long pid) {
    int place = 0;
    while (place < orphans->count && orphans->list[place].pid)
        place++;
    if (pid > 99999999 || (place == orphans->count && !orphans_grow(orphans)))
        return -1;
    if (place == orphans->count)
        orphans->count++;
    orphans->list[place] = (struct orphan){.pid = pid};
    orphans_write(orphans, place);
    return place;
}

void orphans_forget(struct orphans *orphans, int place) {
    if (place < 0 || place >= orphans->count || !orphans->list[place].pid)
        return;
    orphans->list[place] = (struct orphan){0};
    orphans_write(orphans, place);
    while (orphans->count && !orphans->list[orphans->count - 1].pid)
        orphans->count--;
}

void orphans_leave(struct orphans *orphans, int place) {
    if (place < 0 || place >= orphans->count)
        return;
    orphans->list[place].lost = true;
    orphans->list[place].since = time(NULL);
}

void orphans_load(struct orphans *orphans) {
    cleanup_free char *path = orphans_path(orphans);
    cleanup_buf struct buf text = {0};
    struct stat st;
    if (!path || stat(path, &st) < 0 ||
        fs_read(path, ORPHANS_HEAD + ORPHANS_MOST * ORPHAN_LINE, &text) < 0 ||
        text.len < ORPHANS_HEAD)
        return;
    struct guest_facts *facts = &orphans->vm->facts;
    size_t boot = strcspn(text.data, " \n");
    snprintf(orphans->boot, sizeof orphans->boot, "%.*s", (int)boot, text.data);
    snprintf(facts->boot, sizeof facts->boot, "%s", orphans->boot);
    long shell = strtol(text.data + boot, NULL, 10);
    facts->control = shell > 1 ? shell : 0;
    for (size_t at = ORPHANS_HEAD; at + ORPHAN_LINE <= text.len && orphans_grow(orphans);
         at += ORPHAN_LINE) {
        long pid = strtol(text.data + at, NULL, 10);
        orphans->list[orphans->count++] =
            (struct orphan){.pid = pid > 1 ? pid : 0, .lost = pid > 1, .since = st.st_mtime};
    }
}

void orphans_clear(struct orphans *orphans) {
    cleanup_free char *path = orphans_path(orphans);
    free(orphans->list);
    orphans->list = NULL;
    orphans->count = orphans->cap = 0;
    if (orphans->fd >= 0)
        close(orphans->fd);
    orphans->fd = -1;
    if (path)
        unlink(path);
}

static void orphans_ended(void *arg, int status, const char *output, size_t length) {
    (void)arg;
    (void)status;
    (void)output;
    (void)length;
}

void orphans_meet(struct orphans *orphans) {
    const struct guest_facts *facts = &orphans->vm->facts;
    /* Numbers of another boot are other processes'. */
    if (!facts->boot[0] || strcmp(orphans->boot, facts->boot) != 0)
        orphans_clear(orphans);
    snprintf(orphans->boot, sizeof orphans->boot, "%s", facts->boot);
    if (orphans->fd >= 0) {
        orphans_write_head(orphans);
        return;
    }
    orphans_open(orphans);
    if (orphans->fd >= 0) /* it is open while there are commands to note */
        close(orphans->fd);
    orphans->fd = -1;
}

void orphans_end(struct orphans *orphans) {
    struct vm *vm = orphans->vm;
    for (int place = 0; place < orphans->count; place++) {
        cleanup_buf struct buf script = {0};
        if (!orphans->list[place].lost)
            continue;
        if (time(NULL) - orphans->list[place].since > ORPHAN_LIFE_S) {
            orphans_forget(orphans, place);
            continue;
        }
        vm->guest->command_signal(&script, orphans->list[place].pid, "TERM", COMMAND_KILL_S);
        if (script.failed || control_request(vm->control, &script, orphans_ended, NULL) < 0)
            return; /* the next time */
        log_info("%s: a command that was lost is ended", vm->id);
        orphans_forget(orphans, place);
    }
}
