#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "doctor/internal.h"
#include "fuse/device.h"
#include "util/cleanup.h"
#include "util/fs.h"
#include "vmm/process.h"

/* What the host has to offer, whatever is mounted. */

#define PROGRAM_MS 5000 /* for a program to tell its version */
#define CONNECT_MS 1000
#define FUSE_CONF "/etc/fuse.conf"
#define CONF_LIMIT 65536

bool doctor_find_program(const char *name, struct buf *ret_path) {
    cleanup_buf struct buf path = {0};
    const char *own = getenv("PATH");
    buf_printf(&path, "%s:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
               own ? own : "");
    char *rest = NULL;
    for (char *dir = path.failed ? NULL : strtok_r(path.data, ":", &rest); dir;
         dir = strtok_r(NULL, ":", &rest)) {
        buf_clear(ret_path);
        buf_printf(ret_path, "%s/%s", dir, name);
        if (dir[0] == '/' && !ret_path->failed && access(ret_path->data, X_OK) == 0)
            return true;
    }
    return false;
}

/* The value of PRETTY_NAME, without its quotes. */
static void system_print_name(struct buf *out) {
    static const char key[] = "\nPRETTY_NAME=";
    cleanup_buf struct buf text = {0};
    buf_append_char(&text, '\n');
    const char *found =
        fs_read("/etc/os-release", CONF_LIMIT, &text) == 0 ? strstr(text.data, key) : NULL;
    if (!found)
        return;
    found += sizeof key - 1;
    found += strspn(found, "\"'");
    buf_printf(out, "%.*s, ", (int)strcspn(found, "\"'\n"), found);
}

void doctor_check_system(struct doctor *d) {
    struct utsname name;
    cleanup_buf struct buf system = {0};
    system_print_name(&system);
    if (uname(&name) == 0)
        buf_printf(&system, "%s %s %s", name.sysname, name.release, name.machine);
    doctor_find(d, "system", DOCTOR_OK, NULL, "vmsfs %s on %s, user %u", VMSFS_VERSION,
                system.len ? system.data : "an unknown system", (unsigned)getuid());
}

void doctor_check_device(struct doctor *d) {
    cleanup_free char *found = NULL, *remedy = NULL;
    if (fuse_device_check(&found, &remedy))
        doctor_find(d, "fuse", DOCTOR_OK, NULL, "/dev/fuse can be opened");
    else
        doctor_find(d, "fuse", DOCTOR_BROKEN, remedy, "%s", found ? found : "/dev/fuse");
}

void doctor_check_fusermount(struct doctor *d) {
    cleanup_buf struct buf program = {0}, output = {0};
    struct stat st;
    bool root = geteuid() == 0; /* mounts by itself */
    if (!doctor_find_program("fusermount3", &program)) {
        doctor_find(d, "fusermount3", root ? DOCTOR_WARNING : DOCTOR_BROKEN, "apt install fuse3",
                    "fusermount3 is not installed: %s",
                    root ? "nothing clears away the mount of a daemon that has died"
                         : "nobody but root can mount");
        return;
    }
    char *argv[] = {program.data, (char[]){"--version"}, NULL};
    int status = process_run(program.data, argv, PROGRAM_MS, &output);
    static const char before[] = "version: ";
    const char *version = output.len ? strstr(output.data, before) : NULL;
    if (status != 0 || !version)
        doctor_find(d, "fusermount3", root ? DOCTOR_WARNING : DOCTOR_BROKEN,
                    "reinstall the package fuse3", "%s --version does not work", program.data);
    else if (stat(program.data, &st) < 0 || !(st.st_mode & S_ISUID) || st.st_uid != 0)
        doctor_find(d, "fusermount3", root ? DOCTOR_WARNING : DOCTOR_BROKEN,
                    "chown root and chmod 4755 it, or reinstall the package fuse3",
                    "%s is not setuid root: nobody but root can mount", program.data);
    else
        doctor_find(d, "fusermount3", DOCTOR_OK, NULL, "%s, version %.*s, setuid root",
                    program.data, (int)strcspn(version + sizeof before - 1, "\n"),
                    version + sizeof before - 1);
}

/* Is it a line of its own? */
static bool conf_allows_other(void) {
    cleanup_buf struct buf text = {0};
    char *rest = NULL;
    if (fs_read(FUSE_CONF, CONF_LIMIT, &text) < 0 || !text.data)
        return false;
    for (char *line = strtok_r(text.data, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        line += strspn(line, " \t");
        size_t length = strcspn(line, " \t\r#");
        if (length == strlen("user_allow_other") && memcmp(line, "user_allow_other", length) == 0)
            return true;
    }
    return false;
}

void doctor_check_allow_other(struct doctor *d) {
    static const char remedy[] = "write the line user_allow_other to " FUSE_CONF
                                 ", or mount without allow_other and allow_root";
    bool allowed = conf_allows_other();
    if (geteuid() == 0)
        doctor_find(d, "allow_other", DOCTOR_OK, NULL,
                    "root may use -o allow_other; other users %s (user_allow_other in " FUSE_CONF
                    ")",
                    allowed ? "may, too" : "may not");
    else if (allowed)
        doctor_find(d, "allow_other", DOCTOR_OK, NULL,
                    "users may use -o allow_other (user_allow_other in " FUSE_CONF ")");
    else
        doctor_find(d, "allow_other", d->options->others ? DOCTOR_BROKEN : DOCTOR_OK,
                    d->options->others ? remedy : NULL,
                    "only root may use -o allow_other: there is no user_allow_other in " FUSE_CONF);
}

/* Listens, and connects to itself: without a network nothing but that fails. 0 or -errno. */
static int loopback_try(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    cleanup_close int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cleanup_close int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (server < 0 || client < 0 || bind(server, (struct sockaddr *)&address, length) < 0 ||
        listen(server, 1) < 0 || getsockname(server, (struct sockaddr *)&address, &length) < 0)
        return -errno;
    if (connect(client, (struct sockaddr *)&address, length) < 0 && errno != EINPROGRESS)
        return -errno;
    struct pollfd wait = {.fd = server, .events = POLLIN};
    return poll(&wait, 1, CONNECT_MS) == 1 ? 0 : -ETIMEDOUT;
}

void doctor_check_loopback(struct doctor *d) {
    int r = loopback_try();
    if (r < 0)
        doctor_find(d, "ports", DOCTOR_BROKEN,
                    "bring the loopback interface up with ip link set lo up, and let a firewall "
                    "pass it",
                    "guests are reached on ports of 127.0.0.1, which cannot be used: %s",
                    strerror(-r));
    else
        doctor_find(d, "ports", DOCTOR_OK, NULL, "ports of 127.0.0.1 can be listened on");
}

void doctor_check_ssh(struct doctor *d) {
    cleanup_buf struct buf ssh = {0}, keygen = {0}, key = {0};
    buf_printf(&key, "%s/id_ed25519.pub", d->settings->state_dir);
    bool has_key = !key.failed && access(key.data, R_OK) == 0;
    if (!doctor_find_program("ssh-keygen", &keygen) && !has_key)
        doctor_find(d, "ssh", DOCTOR_BROKEN, "apt install openssh-client",
                    "ssh-keygen is not installed, which makes the daemon's key");
    else if (!doctor_find_program("ssh", &ssh))
        doctor_find(d, "ssh", DOCTOR_WARNING, "apt install openssh-client",
                    "ssh is not installed: ssh_config is of no use, everything else works");
    else
        doctor_find(d, "ssh", DOCTOR_OK, NULL, "%s", ssh.data);
}
