//! A real API server with the chart in it, once on etcd and once on kine: what it accepts, whom it lets do what, and what the
//! agent makes of it when it reads its objects there.
//!
//! Each store has one world ([`world`]), which its tests have one after the other: a server takes seconds to start. Stores
//! come last in the tests' names, so that two at a time are of two stores.

mod agents;
mod chart;
mod client;
mod counts;
mod crds;
mod export;
mod gitops;
mod junk;
mod kubernetes;
mod ranges;
mod rights;
mod slots;
mod watches;
mod world;

macro_rules! on_both_stores {
    ($($module:ident::$test:ident,)*) => {
        const TESTS: usize = [$(stringify!($test)),*].len();

        $(mod $test {
            on_both_stores!(@ etcd Etcd, $module::$test);
            on_both_stores!(@ kine Kine, $module::$test);
        })*
    };
    (@ $name:ident $store:ident, $module:ident::$test:ident) => {
        #[test]
        fn $name() {
            super::world::on(lab::apiserver::Store::$store, super::TESTS, super::$module::$test);
        }
    };
}

on_both_stores! {
    agents::a_crd_that_is_deleted_takes_nothing_away_and_comes_back,
    agents::a_kind_that_is_forbidden_is_named,
    agents::a_restart_on_an_empty_list_takes_nothing_away,
    agents::a_start_while_the_server_is_away_goes_on_with_what_it_said,
    agents::a_server_that_hangs_and_one_that_has_forgotten_take_nothing_away,
    agents::objects_arrive_are_followed_and_go_at_once_when_deleted,
    agents::the_order_in_which_the_folder_is_applied_changes_nothing,
    chart::a_kubelet_labels_its_node_only_where_it_joins_and_only_if_that_is_set,
    chart::pod_security_admits_the_pods_once_the_notes_are_followed,
    chart::the_server_takes_the_chart_with_all_values,
    crds::kubectl_shows_what_matters,
    crds::the_schema_refuses_what_it_can_and_validate_the_rest,
    crds::what_must_not_change_does_not,
    export::a_right_that_export_lacks_is_named,
    export::what_is_exported_is_taken_by_another_member,
    gitops::kstatus_and_argo_cd_read_each_status_right,
    junk::junk_and_giants_hold_nobody_up,
    ranges::a_cni_s_kind_that_is_forbidden_is_named,
    ranges::a_cni_s_ranges_are_read_as_they_come,
    ranges::services_ranges_are_nobody_else_s,
    rights::each_may_do_its_own_and_nothing_else,
    slots::a_slot_s_key_is_rotated_by_the_plugin_and_the_folder,
    slots::an_auto_slot_is_taken_over_from_who_is_gone_whatever_the_clocks_say,
    watches::a_steady_cluster_is_not_asked_for_anything,
}
