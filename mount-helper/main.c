#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <mntent.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "options.h"

/* mount.vmsfs: what mount(8) runs for `mount -t vmsfs` and, as mount.fuse.vmsfs, for
 * `mount -t fuse.vmsfs`; see "External helpers" in mount(8).
 *
 * It takes out what is not for the daemon, starts it, and ends when the mount answers, with the
 * exit status that mount(8) has for it. It runs with the rights of whoever called mount(8), which
 * drops its own before it starts a helper. */

/* Exit status of mount(8). */
enum {
    MOUNT_OK = 0,
    MOUNT_USAGE = 1,  /* wrong call */
    MOUNT_SYSTEM = 2, /* out of memory, no vmsfs */
    MOUNT_USER = 8,   /* interrupted by the user */
    MOUNT_FAIL = 32,
};

/* mount(8) takes these out of the environment. */
#define PATH_DEFAULT "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

struct call {
    const char *source, *target;
    const char *namespace; /* file of a mount namespace; NULL: this one */
    bool fake, verbose;
    struct mount_options options;
};

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("mount.vmsfs: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

static void print_usage(FILE *out) {
    fputs("usage: mount.vmsfs SOURCE MOUNTPOINT [-fnsv] [-N NAMESPACE] [-o OPTION,…] [-t TYPE]\n"
          "\n"
          "For mount(8), which runs it for `mount -t vmsfs` and for lines of /etc/fstab.\n"
          "\n"
          "    -f            look at the call only, and mount nothing\n"
          "    -n            accepted: nothing is written to /etc/mtab anyway\n"
          "    -N NAMESPACE  mount in another mount namespace\n"
          "    -o OPTION,…   options of mount(8), dropped where they are not for a file system;\n"
          "                  all others are those of vmsfs\n"
          "    -s            accepted: unknown options are errors nevertheless\n"
          "    -t TYPE       vmsfs or fuse.vmsfs\n"
          "    -v            show the command that is run\n"
          "    -h, -V        this text, the version\n",
          out);
}

static int options_take(struct call *call, const char *list) {
    int r = mount_options_add(&call->options, list);
    if (r == -EINVAL)
        say("-o %s: a quote is not closed", list);
    else if (r < 0)
        say("out of memory");
    return r == 0 ? MOUNT_OK : r == -EINVAL ? MOUNT_USAGE : MOUNT_SYSTEM;
}

static bool type_is_ours(const char *type) {
    return strcmp(type, "vmsfs") == 0 || strcmp(type, "fuse.vmsfs") == 0;
}

/* What follows source and mount point. Those are the first two arguments whatever they look like:
 * a source that starts with a dash is no option. */
static int arguments_take(struct call *call, int argc, char **argv) {
    int option, r;
    while ((option = getopt(argc, argv, "fnsvN:o:t:")) >= 0)
        switch (option) {
        case 'f':
            call->fake = true;
            break;
        case 'v':
            call->verbose = true;
            break;
        case 'N':
            call->namespace = optarg;
            break;
        case 'o':
            if ((r = options_take(call, optarg)) != MOUNT_OK)
                return r;
            break;
        case 't':
            if (!type_is_ours(optarg)) {
                say("-t %s: takes vmsfs or fuse.vmsfs", optarg);
                return MOUNT_USAGE;
            }
            break;
        case 'n':
        case 's':
            break;
        default:
            print_usage(stderr);
            return MOUNT_USAGE;
        }
    if (optind < argc) {
        say("one argument too many: %s", argv[optind]);
        return MOUNT_USAGE;
    }
    return MOUNT_OK;
}

/* The daemon that was installed, or built, together with this program: beside it, or where that
 * folder is from its own. Never from PATH, which is the caller's. */
static char *daemon_find(void) {
    static const char *const places[] = {"vmsfs", VMSFS_FROM_HELPER};
    char self[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self);
    if (length < 0 || length == sizeof self) {
        say("cannot read /proc/self/exe: %s", strerror(length < 0 ? errno : ENAMETOOLONG));
        return NULL;
    }
    self[length] = '\0';
    const char *folder = dirname(self);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        char *path = NULL;
        if (asprintf(&path, "%s/%s", folder, places[i]) < 0) {
            say("out of memory");
            return NULL;
        }
        char *found = access(path, X_OK) == 0 ? realpath(path, NULL) : NULL;
        free(path);
        if (found)
            return found;
    }
    say("there is no vmsfs in %s, nor %s from there: it belongs to the same package", folder,
        VMSFS_FROM_HELPER);
    return NULL;
}

/* mount(8) takes a source for a file if there is one of that name: `vms` of fstab becomes `/vms`
 * when it works in `/`, but stays what it is elsewhere. Returns what it was called in fstab. NULL:
 * it has not been changed. */
static const char *source_as_written(const char *source) {
    char cwd[PATH_MAX];
    const char *name = strrchr(source, '/');
    if (source[0] != '/' || !name[1] || access(source, F_OK) != 0 || !getcwd(cwd, sizeof cwd))
        return NULL;
    size_t length = name == source ? 1 : (size_t)(name - source);
    return strlen(cwd) == length && memcmp(cwd, source, length) == 0 ? name + 1 : NULL;
}

/* Is a mount of this type what one sees at `target`? `source` NULL: whatever its source. */
static bool is_on_top(const char *type, const char *source, const char *target) {
    struct mntent *entry;
    bool found = false;
    FILE *mounts = setmntent("/proc/self/mounts", "r");
    if (!mounts)
        return false;
    while ((entry = getmntent(mounts)))
        if (strcmp(entry->mnt_dir, target) == 0) /* the last one is on top */
            found = strcmp(entry->mnt_type, type) == 0 &&
                    (!source || strcmp(entry->mnt_fsname, source) == 0);
    endmntent(mounts);
    return found;
}

/* Is the call a line of fstab, as mount(8) hands it over? */
static bool call_is_of_fstab(const struct call *call, const char *source) {
    struct mntent *entry;
    bool found = false;
    FILE *fstab = setmntent("/etc/fstab", "r");
    while (!found && fstab && (entry = getmntent(fstab))) {
        struct mount_options options = {0};
        if (!type_is_ours(entry->mnt_type) || strcmp(entry->mnt_fsname, source) != 0)
            continue;
        char *target = realpath(entry->mnt_dir, NULL);
        found = target && strcmp(target, call->target) == 0 &&
                mount_options_add(&options, entry->mnt_opts) == 0 &&
                mount_options_same(&options, &call->options);
        free(options.daemon);
        free(target);
    }
    if (fstab)
        endmntent(fstab);
    return found;
}

/* The first thing to know of a mount that is there already is whether `mount -a` has asked, which
 * could not see it: either since the names differ, or since there is an automount point of the same
 * line of fstab: whoever is not its owner has it mounted by looking (statfs(2), not stat(2)). That
 * is no error. False: there is none, or its daemon is dead. */
static bool is_mounted(const struct call *call, const char *written, int *ret_status) {
    const char *source = written ? written : call->source;
    struct statfs fs;
    bool automount = is_on_top("autofs", NULL, call->target);
    if (automount)
        statfs(call->target, &fs);
    if (!is_on_top("fuse.vmsfs", source, call->target) || statfs(call->target, &fs) < 0)
        return false;
    *ret_status = MOUNT_OK;
    if ((!automount && !written) || !call_is_of_fstab(call, source)) {
        say("%s is mounted on %s already", source, call->target);
        *ret_status = MOUNT_FAIL;
    }
    return true;
}

static bool environment_complete(void) {
    const struct passwd *user;
    if (!getenv("HOME") && (user = getpwuid(getuid())) && user->pw_dir[0] == '/' &&
        setenv("HOME", user->pw_dir, 1) < 0)
        return false;
    return getenv("PATH") || setenv("PATH", PATH_DEFAULT, 1) == 0;
}

static bool namespace_enter(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && setns(fd, CLONE_NEWNS) == 0) {
        close(fd);
        return true;
    }
    say("-N %s: the namespace cannot be entered: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    return false;
}

static void command_show(char *const *argv) {
    fputs("mount.vmsfs:", stdout);
    for (; *argv; argv++) {
        fputs(" '", stdout);
        for (const char *c = *argv; *c; c++)
            if (*c == '\'')
                fputs("'\\''", stdout);
            else
                fputc(*c, stdout);
        fputc('\'', stdout);
    }
    fputc('\n', stdout);
    fflush(stdout);
}

/* The daemon's own first process ends when the mount answers, or has said why there is none. */
static int daemon_start(char *const *argv) {
    const struct sigaction ignore = {.sa_handler = SIG_IGN};
    struct sigaction interrupt, quit;
    /* Ctrl-C is for the daemon as well, and what it makes of it is what we tell. */
    sigaction(SIGINT, &ignore, &interrupt);
    sigaction(SIGQUIT, &ignore, &quit);
    pid_t pid = fork();
    if (pid == 0) {
        sigaction(SIGINT, &interrupt, NULL);
        sigaction(SIGQUIT, &quit, NULL);
        execv(argv[0], argv);
        say("cannot run %s: %s", argv[0], strerror(errno));
        _exit(MOUNT_SYSTEM);
    }
    int status;
    while (pid > 0 && waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            pid = -1;
    if (pid < 0) {
        say("cannot run %s: %s", argv[0], strerror(errno));
        return MOUNT_SYSTEM;
    }
    if (WIFEXITED(status))
        return WEXITSTATUS(status) == 0              ? MOUNT_OK
               : WEXITSTATUS(status) == MOUNT_SYSTEM ? MOUNT_SYSTEM
                                                     : MOUNT_FAIL;
    if (WTERMSIG(status) == SIGINT || WTERMSIG(status) == SIGQUIT)
        return MOUNT_USER;
    say("%s was ended by signal %d", argv[0], WTERMSIG(status));
    return MOUNT_FAIL;
}

static int call_mount(const struct call *call) {
    if (call->options.remount) {
        say("%s cannot be remounted: unmount it, and mount it with the other options",
            call->target);
        return MOUNT_FAIL;
    }
    const char *written = source_as_written(call->source);
    int status = MOUNT_OK;
    if (!call->fake && !call->namespace && is_mounted(call, written, &status))
        return status;
    char *program = daemon_find();
    if (!program || !environment_complete())
        return MOUNT_SYSTEM;
    const char *options = call->options.daemon ? call->options.daemon : "";
    const char *argv[7] = {program};
    size_t count = 1;
    if (options[0]) {
        argv[count++] = "-o";
        argv[count++] = options;
    }
    argv[count++] = "--";
    argv[count++] = written ? written : call->source;
    argv[count] = call->target;
    if (call->verbose)
        command_show((char *const *)argv);
    if (!call->fake)
        status = call->namespace && !namespace_enter(call->namespace)
                     ? MOUNT_FAIL
                     : daemon_start((char *const *)argv);
    free(program);
    return status;
}

int main(int argc, char **argv) {
    struct call call = {0};
    if (getauxval(AT_SECURE)) {
        say("is not made to be setuid: mount(8) and fusermount3 have the rights that it takes");
        return MOUNT_SYSTEM;
    }
    if (argc == 2 && (strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "--help") == 0)) {
        print_usage(stdout);
        return MOUNT_OK;
    }
    if (argc == 2 && (strcmp(argv[1], "-V") == 0 || strcmp(argv[1], "--version") == 0)) {
        printf("mount.vmsfs %s\n", VMSFS_VERSION);
        return MOUNT_OK;
    }
    if (argc < 3) {
        print_usage(stderr);
        return MOUNT_USAGE;
    }
    call.source = argv[1];
    call.target = argv[2];
    argv[2] = argv[0];
    int status = arguments_take(&call, argc - 2, argv + 2);
    if (status == MOUNT_OK)
        status = call_mount(&call);
    free(call.options.daemon);
    return status;
}
