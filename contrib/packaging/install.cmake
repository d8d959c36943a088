# What `cmake --install` puts where. With the prefix /usr it is Debian's layout, and cpack makes a package of it.

# Programs that any user may run are in bin, what is for mount(8) alone in sbin.
install(TARGETS vmsfs RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(TARGETS mount.vmsfs RUNTIME DESTINATION ${CMAKE_INSTALL_SBINDIR})
# `mount -t fuse.vmsfs`, which is also how the mount's type reads once it is there.
install(CODE "file(CREATE_LINK mount.vmsfs
  \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_SBINDIR}/mount.fuse.vmsfs\" SYMBOLIC)")
install(PROGRAMS contrib/guest/tiny DESTINATION ${CMAKE_INSTALL_BINDIR} RENAME vmsfs-guest-tiny)
install(FILES contrib/guest/vsock_bridge.c DESTINATION ${CMAKE_INSTALL_DATADIR}/vmsfs) # it compiles this for the guest

install(DIRECTORY contrib/presets DESTINATION ${CMAKE_INSTALL_DATADIR}/vmsfs)
install(FILES README.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(FILES contrib/guest/README.md DESTINATION ${CMAKE_INSTALL_DOCDIR} RENAME guest-images.md)

configure_file(contrib/systemd/vmsfs@.service.in vmsfs@.service @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/vmsfs@.service DESTINATION lib/systemd/system)
install(DIRECTORY contrib/systemd/examples DESTINATION ${CMAKE_INSTALL_DOCDIR})

# Compressed as in Debian's packages: without name and time, so that builds can be compared. The rest of
# the arguments is a command that reads the source.
function(add_compressed target source)
  add_custom_command(OUTPUT ${target} DEPENDS ${source} VERBATIM
    COMMAND sh -c "source=$1 target=$2; shift 2; \"$@\" <\"$source\" | gzip -9n >\"$target\""
            sh ${source} ${target} ${ARGN})
endfunction()

# Manual pages: what the target `man` has made.
file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/man-gz)
foreach(page IN LISTS man_pages)
  get_filename_component(name ${page} NAME)
  string(REGEX REPLACE "^.*\\." "" section ${name})
  add_compressed(${PROJECT_BINARY_DIR}/man-gz/${name}.gz ${page} cat)
  list(APPEND manuals ${PROJECT_BINARY_DIR}/man-gz/${name}.gz)
  install(FILES ${PROJECT_BINARY_DIR}/man-gz/${name}.gz DESTINATION ${CMAKE_INSTALL_MANDIR}/man${section})
endforeach()
add_custom_target(manuals ALL DEPENDS ${manuals})
if(TARGET man) # make would run the commands for a page twice, at the same time
  add_dependencies(manuals man)
endif()
# Programs by another name than their page's.
foreach(link mount.fuse.vmsfs.8:mount.vmsfs.8 vmsfs-guest-tiny.7:vmsfs-guest.7)
  string(REPLACE : ";" link ${link})
  list(GET link 0 name)
  list(GET link 1 page)
  string(REGEX REPLACE "^.*\\." "" section ${page})
  if(${PROJECT_BINARY_DIR}/man-gz/${page}.gz IN_LIST manuals)
    install(CODE "file(CREATE_LINK ${page}.gz
      \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_MANDIR}/man${section}/${name}.gz\" SYMBOLIC)")
  endif()
endforeach()

# Completions. bash-completion loads the file that has a program's name: `run` is that of a VM. Debian's zsh looks
# for those of packages in a place of its own.
set(bash_completions ${CMAKE_INSTALL_DATADIR}/bash-completion/completions)
install(FILES contrib/completions/vmsfs.bash RENAME vmsfs DESTINATION ${bash_completions})
install(CODE "file(CREATE_LINK vmsfs \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${bash_completions}/run\" SYMBOLIC)")
if(CMAKE_INSTALL_PREFIX STREQUAL "/usr" AND EXISTS /etc/debian_version)
  set(zsh vendor-completions)
else()
  set(zsh site-functions)
endif()
install(FILES contrib/completions/_vmsfs DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/${zsh})
