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

# Documents, and the examples for configuration management, which have some of their own. What they say of the sources is put right.
configure_file(contrib/packaging/installed.sed installed.sed @ONLY)
function(install_document source target)
  set(made ${PROJECT_BINARY_DIR}/documents/${target})
  get_filename_component(folder ${target} DIRECTORY)
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/documents/${folder})
  add_custom_command(OUTPUT ${made} DEPENDS ${PROJECT_SOURCE_DIR}/${source} ${PROJECT_BINARY_DIR}/installed.sed VERBATIM
    COMMAND sh -c "sed -f \"$1\" \"$2\" >\"$3\"" sh ${PROJECT_BINARY_DIR}/installed.sed ${PROJECT_SOURCE_DIR}/${source} ${made})
  set_property(GLOBAL APPEND PROPERTY documents ${made})
  install(FILES ${made} DESTINATION ${CMAKE_INSTALL_DOCDIR}/${folder})
endfunction()
install_document(README.md README.md)
install_document(contrib/guest/README.md guest-images.md)
install(DIRECTORY contrib/ansible contrib/puppet contrib/salt DESTINATION ${CMAKE_INSTALL_DOCDIR}/examples
  USE_SOURCE_PERMISSIONS PATTERN README.md EXCLUDE PATTERN examples/init.pp EXCLUDE PATTERN __pycache__ EXCLUDE)
foreach(folder ansible/roles/vmsfs_vm puppet/vmsfs salt)
  install_document(contrib/${folder}/README.md examples/${folder}/README.md)
endforeach()
install_document(contrib/puppet/vmsfs/examples/init.pp examples/puppet/vmsfs/examples/init.pp)
get_property(documents GLOBAL PROPERTY documents)
add_custom_target(documents ALL DEPENDS ${documents})

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
